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

    and the score is the :func:`top_mean` of A.
    """
    size = max((m.shape[1:] for m in maps), key=lambda s: s[0] * s[1])
    total, share = 0.0, sum(weights)
    for map_, (mean, deviation), weight in zip(maps, statistics, weights, strict=True):
        total = total + resized((map_ - mean) / deviation, size) * (weight / share)
    if smoothing:
        total = gaussian_blur(total, smoothing)
    return total, top_mean(total, top)


def standards(
    statistics: Sequence[MapStatistics], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and factors (K,1,h,w), or (K,1,1,1), of K maps of one size, for :func:`weighted`."""
    means, deviations = (
        torch.stack(torch.broadcast_tensors(*part)) for part in zip(*statistics, strict=True)
    )
    shape = (len(means), 1, *(means.shape[1:] or (1, 1)))
    shares = means.new_tensor(weights).div(sum(weights)).view(-1, *[1] * (means.dim() - 1))
    return means.view(shape), (shares / deviations).view(shape)


def weighted(maps: torch.Tensor, means: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """What :func:`fuse` makes of maps (K,N,h,w) without smoothing, in a few calls: (N,h,w)."""
    # One by one, in the same order whatever N is.
    first, *others = ((maps - means) * factors).unbind()
    for map_ in others:
        first = first + map_
    return first


def top_mean(map_: torch.Tensor, top: float) -> torch.Tensor:
    """(N,): the mean of the max(1, round(top h w)) largest values of maps (N,h,w), or of curves."""
    values = map_.flatten(1)
    count = max(1, round(top * values.shape[1]))
    return values.amax(dim=1) if count == 1 else values.topk(count, dim=1).values.mean(dim=1)


def resized(map_: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(N,h,w) to (N,*size), bilinear."""
    if tuple(map_.shape[1:]) == tuple(size):
        return map_
    return F.interpolate(map_[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]
