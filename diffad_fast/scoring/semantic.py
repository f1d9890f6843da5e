"""How far features are from those of normal data."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import nn

from ..representations.whitening import Moments, Whitening

# Normal features that `nearest` keeps: its cost and memory grow with them.
LARGEST_SAMPLE = 4096
NEIGHBOURS = 5
# How many more than are asked for are looked for in float32, to be chosen from in float64.
MORE = 2
# Of fewer numbers than these, neighbours are found sooner in float64, which needs no checks.
FEW = 64


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
            # Put together, all that is kept would be twice in memory.
            ends = list(accumulate(map(len, kept)))
            chosen = torch.randperm(ends[-1], generator=generator)[:LARGEST_SAMPLE].tolist()
            owners = [bisect_right(ends, i) for i in chosen]
            rows = torch.stack([kept[k][i - ends[k]] for k, i in zip(owners, chosen, strict=True)])
            scale = moments.covariance.trace().clamp(min=1e-12).sqrt().float()
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
        # A million distances at a time; a program that is exported takes batches of any length.
        parts = [rows] if torch.compiler.is_exporting() else rows.split(256)
        count = min(NEIGHBOURS + 1, len(self.sample))
        by_float32 = _rounds_to_float32(rows) and rows.numel() >= FEW
        find = _nearest_by_float32 if by_float32 else _nearest
        distances = []
        for part in parts:
            exact = find(part, self.sample, count)
            # Equal but for the rounding of what made the features, in batches of other sizes.
            own = exact[:, 0] <= 1e-5 * (1 + part.double().norm(dim=1))
            others = max(1, count - 1)
            means = exact[:, -others:].mean(dim=1), exact[:, :others].mean(dim=1)
            distances.append(torch.where(own, *means))
        return torch.cat(distances).to(x.dtype).reshape(x.shape[:-1])


def _nearest(rows: torch.Tensor, sample: torch.Tensor, count: int) -> torch.Tensor:
    """Distances (n,count) float64 of rows (n,C) to the nearest of a sample (S,C), in order."""
    # A matrix product finds the nearest. It leaves |a|^2 - 2 ab + |b|^2, which cancels where a
    # point is near, and what is left depends on how many rows the product has: the distances are
    # those of the differences.
    rows, sample = rows.double(), sample.double()
    rough = torch.cdist(rows, sample, compute_mode="use_mm_for_euclid_dist")
    return _distances(rows, sample[rough.topk(count, largest=False).indices])


def _nearest_by_float32(rows: torch.Tensor, sample: torch.Tensor, count: int) -> torch.Tensor:
    """The same, found in float32, where that is certain to miss none."""
    half = sample.square().sum(dim=1) / 2
    rough = torch.addmm(half, rows, sample.T, alpha=-1)  # (|a - b|^2 - |a|^2) / 2
    lowest, found = rough.topk(min(count + MORE, len(sample)), largest=False)
    wide = rows.double()
    exact = _distances(wide, sample[found].double())[:, :count]
    # A sum of C products in any order is wrong by at most C roundings of the sum of their sizes,
    # |a| |b| (Higham 2002, 3.1): no other of the sample is nearer than this. Bounds are doubled for
    # the roundings here, and hold where nothing overflows.
    length = wide.norm(dim=1)
    largest = half.double().max().mul(2).sqrt()
    sizes = largest * (length + largest)
    roundings = 2.0**-24 * sizes + 2.0**-53 * length**2 + 2.0**-126
    wrong = 2 * (rows.shape[1] + 4) * roundings
    others = (length**2 + 2 * (lowest[:, -1].double() - wrong)).clamp(min=0)
    unsure = ~((exact[:, -1].square() <= others) & (sizes < 1e37))
    if len(sample) > found.shape[1] and unsure.any():
        exact[unsure] = _nearest(rows[unsure], sample, count)
    return exact


def _distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Of rows (n,C) to their own others (n,k,C), in order."""
    return (rows[:, None] - others).square().sum(dim=-1).sqrt().sort(dim=1).values


def _rounds_to_float32(x: torch.Tensor) -> bool:
    """Whether a matrix product of x is one on the CPU whose rounding is known to be float32's."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # What lets a library round factors to bfloat16 or TF32.
    return (
        torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
        and os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT").upper() == "STRICT"
        and not torch.is_autocast_enabled("cpu")
    )
