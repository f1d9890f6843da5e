"""How far features are from those of normal data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..representations.whitening import Moments, Whitening

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

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor], seed: int) -> None:
        """Learn from batches (...,C) of normal features."""
        moments, kept = Moments(), []
        generator = torch.Generator().manual_seed(seed)
        for features in batches:
            rows = features.reshape(-1, features.shape[-1])
            moments.add(rows)
            if self.kind == "nearest":
                kept.append(rows)
        self.whitening.fit(moments)
        if self.kind == "nearest":
            rows = torch.cat(kept)
            chosen = torch.randperm(len(rows), generator=generator)[:LARGEST_SAMPLE]
            scale = moments.covariance.trace().clamp(min=1e-12).sqrt().float()
            self.whitening.matrix = torch.eye(rows.shape[1], device=rows.device) / scale
            self.sample = self._scaled(rows[chosen.to(rows.device)])

    def _scaled(self, features: torch.Tensor) -> torch.Tensor:
        """What whitening by a diagonal comes to, without the rounding of a matrix product."""
        return (features - self.whitening.mean) * self.whitening.matrix.diagonal()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(...,C) to (...)."""
        if self.kind == "mahalanobis":
            return self.whitening(features).square().mean(dim=-1)
        x = self._scaled(features)
        rows = x.reshape(-1, x.shape[-1])
        # A few million distances at a time; a program that is exported takes batches of any length.
        parts = [rows] if torch.compiler.is_exporting() else rows.split(1024)
        count = min(NEIGHBOURS + 1, len(self.sample))
        sample = self.sample.double()
        distances = []
        for part in parts:
            # A matrix product finds the nearest. It leaves |a|^2 - 2 ab + |b|^2, which cancels
            # where a point is near, and what is left depends on how many rows the product has:
            # the distances are those of the differences.
            rough = torch.cdist(part.double(), sample, compute_mode="use_mm_for_euclid_dist")
            nearest = rough.topk(count, largest=False).indices
            exact = (part.double()[:, None] - sample[nearest]).square().sum(dim=-1).sqrt()
            exact = exact.sort(dim=1).values
            # Equal but for the rounding of what made the features, in batches of other sizes.
            own = exact[:, 0] <= 1e-5 * (1 + part.double().norm(dim=1))
            others = max(1, count - 1)
            means = exact[:, -others:].mean(dim=1), exact[:, :others].mean(dim=1)
            distances.append(torch.where(own, *means))
        return torch.cat(distances).to(x.dtype).reshape(x.shape[:-1])
