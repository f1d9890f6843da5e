"""What the anomaly maps look like on normal data: the statistics that standardise them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from typing import NamedTuple

import torch

from ..representations.moments import Moments

# A share of the map's mean deviation below which no position's deviation may fall: where normals
# never differ (a constant border), any rounding error would otherwise be an infinite anomaly.
SMALLEST_SHARE = 1e-3
# Below so many normals the deviations of maps of one unit are drawn together, as if so many more
# had been seen whose deviation was the median one.
FEW_NORMALS, PRIOR_NORMALS = 8, 4


class MapStatistics(NamedTuple):
    """Mean and deviation of one map on held-out normals: (H,W) each, or scalars of shape ()."""

    mean: torch.Tensor
    deviation: torch.Tensor


class _MapMoments(Moments):
    """The moments of maps (n,H,W), per position, in float64."""

    def add(self, maps: torch.Tensor) -> None:
        maps = maps.double()
        if len(maps):
            mean = maps.mean(dim=0)
            self.merge(len(maps), mean, (maps - mean).square().sum(dim=0))

    def scalar(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance over images and positions together."""
        mean = self.mean.mean()
        variance = self.scatter.mean() / self.count + (self.mean - mean).square().mean()
        return mean, variance

    def position(self, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (H,W), smoothed over positions by a Gaussian of ``sigma`` pixels.

        The first two moments are smoothed, so that the variance keeps what the mean loses.
        """
        second = self.scatter / self.count + self.mean**2
        mean, second = _blur(torch.stack([self.mean, second]), sigma)
        return mean, (second - mean**2).clamp(min=0)


def fit_statistics(
    batches: Iterable[tuple[Sequence[torch.Tensor | None], Sequence[int]]],
    kind: str,
    smoothing: float,
    alike: bool = False,
) -> list[MapStatistics | None]:
    """Statistics of each map from batches of maps (n,H,W) of held-out normals.

    A batch has one entry a map, None where a map of :data:`ops.maps.MAPS` has no weight, and the
    object of each of its n normals, by a number.
    ``kind`` is "position", "scalar" or "auto": then each map takes what predicts better, by the
    Gaussian log-likelihood, one half of the objects from the other and the other way round.
    ``smoothing`` is the deviation in pixels of the Gaussian over positions. ``alike``: the maps
    have one unit. Of fewer than 8 normals a map's deviation is then drawn towards the median m of
    all maps' deviations, sqrt((n d^2 + 4 m^2) / (n + 4)): that of a map with one position, of which
    one or two normals tell next to nothing, would otherwise be close to 0 and its map all there is;
    m = 1, the unit itself, where not even the median is more than 0.
    """
    halves: list[list[_MapMoments]] | None = None
    sizes, half = [0, 0], {}  # of the halves; of an object
    for maps, objects in batches:
        if halves is None:
            halves = [[_MapMoments(), _MapMoments()] if m is not None else [] for m in maps]
        sides = []
        for number in objects:
            sides.append(half.setdefault(number, int(sizes[1] < sizes[0])))
            sizes[sides[-1]] += 1
        sides = torch.tensor(sides)
        for moments, map_ in zip(halves, maps, strict=True):
            for side, of_half in enumerate(moments):
                of_half.add(map_[(sides == side).to(map_.device)])
    seen = sum(sizes)
    found = [_choose(m[0], m[1], kind, smoothing) if m else None for m in halves or []]
    if not alike or seen >= FEW_NORMALS:
        return found
    deviations = [s.deviation.square().mean().sqrt() for s in found if s is not None]
    typical = torch.stack(deviations).median()
    # Of one normal no map with one position has a deviation: its own unit is left.
    typical = torch.where(typical > 1e-6, typical, 1.0)
    prior = typical.square() * PRIOR_NORMALS
    return [
        s and MapStatistics(
            s.mean, ((seen * s.deviation.square() + prior) / (seen + PRIOR_NORMALS)).sqrt()
        )
        for s in found
    ]  # fmt: skip


def _choose(even: _MapMoments, odd: _MapMoments, kind: str, smoothing: float) -> MapStatistics:
    if even.count == 0 or odd.count == 0:
        both = odd if even.count == 0 else even
        # Of one object nothing predicts another; of one normal only the spread within its map is
        # known.
        kind = "scalar" if kind == "auto" or both.count == 1 else kind
    else:
        both = copy(even)
        both.merge(odd.count, odd.mean, odd.scatter)
    if kind == "auto":
        by_position, by_scalar = 0.0, 0.0
        for fitted, held_out in ((even, odd), (odd, even)):
            by_position += _misfit(fitted.position(smoothing), held_out)
            by_scalar += _misfit(fitted.scalar(), held_out)
        kind = "position" if by_position < by_scalar else "scalar"
    mean, variance = both.position(smoothing) if kind == "position" else both.scalar()
    deviation = variance.sqrt()
    floor = (deviation.mean() * SMALLEST_SHARE).clamp(min=1e-12)
    return MapStatistics(mean.float(), deviation.clamp(min=floor).float())


def _misfit(prediction: tuple[torch.Tensor, torch.Tensor], held_out: _MapMoments) -> float:
    """Mean negative Gaussian log-likelihood of held-out maps, up to a constant.

    Over n maps with mean m and variance v, the mean of (x - mu)^2 is v + (m - mu)^2: the moments
    are enough, and no second pass over the maps is needed.
    """
    mean, variance = prediction
    variance = variance.clamp(min=(variance.mean() * SMALLEST_SHARE**2).clamp(min=1e-24))
    squared = held_out.scatter / held_out.count + (held_out.mean - mean).square()
    return float((variance.log() / 2 + squared / (2 * variance)).mean())


def _blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian over the last two axes; at borders the weights inside are renormalised."""
    if sigma == 0:
        return x
    for axis in (-1, -2):
        position = torch.arange(x.shape[axis], dtype=x.dtype, device=x.device)
        weights = torch.exp(-((position[:, None] - position) ** 2) / (2 * sigma**2))
        weights = weights / weights.sum(dim=1, keepdim=True)
        x = x @ weights.T if axis == -1 else weights @ x
    return x
