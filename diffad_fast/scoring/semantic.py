"""How far features are from those of normal data."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import nn

from .. import ops
from ..representations.moments import JointMoments
from ..representations.whitening import Whitening

# Normal features that `nearest` keeps: its cost and memory grow with them.
LARGEST_SAMPLE = 4096
NEIGHBOURS = 5


class FeatureDistance(nn.Module):
    """Distance of feature vectors (...,C) to those of normals.

    kind: "mahalanobis" is the mean square of the features after whitening by the principal
    components of normal features (Lee et al. 2018, one class); "nearest" the mean distance to the
    five nearest of a sample of normal features, over the root of their total variance. What stands
    in that sample itself is not its own neighbour: one that is equal is left out.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.whitening = Whitening()
        self.register_buffer("sample", torch.zeros(0, 0))
        self.eval()  # nothing here is trained

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor], seed: int) -> None:
        """Learn from batches (...,C) of normal features."""
        moments, kept = JointMoments(), []
        generator = torch.Generator().manual_seed(seed)
        for features in batches:
            rows = features.reshape(-1, features.shape[-1])
            moments.add(rows)
            if self.kind == "nearest":
                kept.append(rows)
        if self.kind == "mahalanobis":
            self.whitening.fit(moments)
        else:
            # Put together, all that is kept would be twice in memory.
            ends = list(accumulate(map(len, kept)))
            chosen = torch.randperm(ends[-1], generator=generator)[:LARGEST_SAMPLE].tolist()
            owners = [bisect_right(ends, i) for i in chosen]
            rows = torch.stack([kept[k][i - ends[k]] for k, i in zip(owners, chosen, strict=True)])
            scale = moments.covariance.trace().clamp(min=1e-12).sqrt().float()
            self.whitening.mean = moments.mean.float()
            self.whitening.matrix = torch.eye(rows.shape[1], device=rows.device) / scale
            self.sample = self._scaled(rows)

    def _scaled(self, features: torch.Tensor) -> torch.Tensor:
        """What whitening by a diagonal comes to, without the rounding of a matrix product."""
        return (features - self.whitening.mean) * self.whitening.matrix.diagonal()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(...,C) to (...)."""
        if self.kind == "mahalanobis":
            return self.whitening(features).square().mean(dim=-1)
        x = self._scaled(features)
        rows = x.reshape(-1, x.shape[-1])
        count = min(NEIGHBOURS + 1, len(self.sample))
        found = ops.nearest_distances(rows, self.sample, count)
        if count > 1:
            # Equal but for the rounding of what made the features, in batches of other sizes.
            length = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
            own = found[:, :1] <= 1e-5 * (1 + length)
            found = torch.where(own, found[:, 1:], found[:, :-1])
        return found.mean(dim=1).to(x.dtype).reshape(x.shape[:-1])
