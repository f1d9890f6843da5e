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
    five nearest of a sample of normal features, over the root of their total variance.
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
            self.sample = self.whitening(rows[chosen.to(rows.device)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(...,C) to (...)."""
        x = self.whitening(features)
        if self.kind == "mahalanobis":
            return x.square().mean(dim=-1)
        rows = x.reshape(-1, x.shape[-1])
        # A few million distances at a time; a program that is exported takes batches of any length.
        parts = [rows] if torch.compiler.is_exporting() else rows.split(1024)
        count = min(NEIGHBOURS, len(self.sample))
        # As one matrix product, in float64: |a|^2 - 2 ab + |b|^2 cancels where a point is near, and
        # in float32 what is left would depend on how many rows the product has.
        way, sample = "use_mm_for_euclid_dist", self.sample.double()
        nearest = [
            torch.cdist(part.double(), sample, compute_mode=way)
            .topk(count, largest=False)
            .values.mean(dim=1)
            for part in parts
        ]
        return torch.cat(nearest).to(x.dtype).reshape(x.shape[:-1])
