"""Tokens to unit variance: by principal components, by feature, or by one number."""

from __future__ import annotations

import torch
from torch import nn

from .moments import JointMoments

# Share of the largest eigenvalue below which none may fall: directions in which normals hardly
# vary are noise of the estimate, and would be blown up to the size of a signal.
SMALLEST_EIGENVALUE = 1e-3


class Whitening(nn.Module):
    """Tokens (...,D) to (x - mean) @ matrix, of about unit variance on normal data.

    matrix (D,D) holds the principal directions, each over its deviation; no eigenvalue counts as
    less than the share ``smallest`` of the largest. standardise: divide every number by its own
    deviation first, for tokens whose numbers have different units.
    """

    def __init__(self, smallest: float = SMALLEST_EIGENVALUE, standardise: bool = False):
        super().__init__()
        self.smallest, self.standardise = smallest, standardise
        self.register_buffer("mean", torch.zeros(0))
        self.register_buffer("matrix", torch.zeros(0, 0))

    @property
    def dim(self) -> int:
        return self.matrix.shape[1]

    def fit(self, moments: JointMoments) -> None:
        covariance = moments.covariance
        scale = torch.ones_like(moments.mean)
        if self.standardise:
            scale = covariance.diagonal().sqrt()
            # What never varies among normals counts in the unit of a typical deviation.
            varies = scale > 1e-6 * scale.max()
            typical = scale[varies].median() if varies.any() else torch.ones_like(scale[0])
            scale = torch.where(varies, scale, typical.clamp(min=1e-6))
        values, directions = torch.linalg.eigh(covariance / scale / scale[:, None])
        floor = (values[-1] * self.smallest).clamp(min=1e-12)
        self.mean = moments.mean.float()
        # eigh gives columns; the same bits after a checkpoint need the layout it restores.
        matrix = directions / values.clamp(min=floor).sqrt() / scale[:, None]
        self.matrix = matrix.float().contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # One matrix product: the mean goes through the matrix as a bias.
        return torch.nn.functional.linear(x, self.matrix.T, -(self.mean @ self.matrix))
