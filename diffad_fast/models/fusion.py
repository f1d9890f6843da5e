"""From the raw maps of a batch to one map and one score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..reference.maps import gaussian_blur
from ..scoring import MapStatistics


def fuse(
    maps: Sequence[torch.Tensor],
    statistics: Sequence[MapStatistics],
    weights: Sequence[float],
    smoothing: float,
    top: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (N,h_i,w_i) to one of the size of the finest, and a score (N,).

    With z_i = (map_i - mean_i) / deviation_i, brought bilinearly to the finest grid, and G a
    Gaussian of deviation ``smoothing`` in its cells::

        A = G * sum_i weights_i z_i / sum_i weights_i
        score = mean of the max(1, round(top h w)) largest values of A
    """
    size = max((m.shape[1:] for m in maps), key=lambda s: s[0] * s[1])
    total, share = 0.0, sum(weights)
    for map_, (mean, deviation), weight in zip(maps, statistics, weights, strict=True):
        total = total + resized((map_ - mean) / deviation, size) * (weight / share)
    if smoothing:
        total = gaussian_blur(total, smoothing)
    count = max(1, round(top * size[0] * size[1]))
    return total, total.flatten(1).topk(count, dim=1).values.mean(dim=1)


def resized(map_: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(N,h,w) to (N,*size), bilinear."""
    if tuple(map_.shape[1:]) == tuple(size):
        return map_
    return F.interpolate(map_[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]
