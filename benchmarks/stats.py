"""Quantiles, intervals and slopes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
GROUP_RESAMPLES = 1000


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Of times in ms; p99 is the largest of them where they are few."""
    values = np.quantile(samples, [0.2, 0.5, 0.8, 0.99])
    return dict(zip(("p20", "p50", "p80", "p99"), map(float, values), strict=True))


def ratio(
    numerator: Sequence[float], denominator: Sequence[float], paired: bool
) -> tuple[float, float, float]:
    """Ratio of the medians with its 95% bootstrap interval (Efron & Tibshirani 1993, percentiles).

    ``paired``: sample i of both was taken in the same round and shares its noise; rounds are drawn,
    not single samples.
    """
    a, b = np.asarray(numerator), np.asarray(denominator)
    rng = np.random.default_rng(0)
    rows = rng.integers(len(a), size=(RESAMPLES, len(a)))
    other = rows if paired else rng.integers(len(b), size=(RESAMPLES, len(b)))
    drawn = np.median(a[rows], axis=1) / np.median(b[other], axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def over_groups(
    groups: Sequence, measure: Callable[[np.ndarray], dict | None]
) -> tuple[dict[object, float], dict[object, np.ndarray]]:
    """What ``measure`` gives for all rows, and for those of groups that are drawn with replacement,
    all of a group's rows together: photographs of one object and clips of one recording are no
    independent evidence. None is drawn again. One draw serves all figures, so that differences are
    paired."""
    groups = np.asarray(groups)
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    drawn: list[dict] = []
    while len(drawn) < GROUP_RESAMPLES:
        chosen = rng.integers(len(members), size=len(members))
        found = measure(np.concatenate([members[i] for i in chosen]))
        if found is not None:
            drawn.append(found)
    observed = measure(np.arange(len(groups)))
    return observed, {name: np.array([one[name] for one in drawn]) for name in observed}


def interval(drawn: np.ndarray) -> list[float]:
    """95%, by percentiles."""
    return np.quantile(drawn, [0.025, 0.975]).tolist()


def difference(observed: dict, drawn: dict, ours: object, other: object) -> list[float]:
    """Of two figures of :func:`over_groups`, as it was observed, and its interval."""
    return [float(observed[ours] - observed[other]), *interval(drawn[ours] - drawn[other])]


def compared(low: float, high: float) -> str:
    """In words, a difference of ours to another with this interval."""
    return "beats" if low > 0 else "loses to" if high < 0 else "does not differ from"


def verdict(low: float, high: float, margin: float = 0.0) -> str:
    """Of a ratio other / ours: "faster" or "slower" only if the interval excludes 1 (± margin)."""
    if low > 1 + margin:
        return "faster"
    if high < 1 / (1 + margin):
        return "slower"
    return "even"


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """b of y ~ x^b, by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
