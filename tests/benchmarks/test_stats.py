"""Intervals, verdicts and slopes."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import stats


def test_faster_only_if_the_interval_excludes_one():
    rng = np.random.default_rng(1)
    ours = 1 + 0.1 * rng.standard_normal(40)
    ratio, low, high = stats.ratio(2 * ours, ours, paired=True)
    assert ratio == pytest.approx(2) and low == pytest.approx(2) and high == pytest.approx(2)
    ratio, low, high = stats.ratio(2 * ours, ours, paired=False)
    assert low < 1.97 and high > 2.03  # without pairs the noise that both share counts
    ratio, low, high = stats.ratio(1 + 0.1 * rng.standard_normal(40), ours, paired=False)
    assert low < 1 < high and stats.verdict(low, high) == "even"
    assert stats.verdict(1.01, 1.2) == "faster" and stats.verdict(0.8, 0.99) == "slower"
    assert stats.verdict(1.01, 1.2, margin=0.05) == "even"


def test_bootstrap_interval_covers_the_true_ratio():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        a, b = 3 * np.exp(0.1 * rng.standard_normal((2, 30)))
        _, low, high = stats.ratio(a, b / 3 * 2, paired=False)
        hits += low <= 1.5 <= high
    assert 88 <= hits <= 100  # 95 expected; 88 has a probability below 0.5%


def test_slope_of_a_power_law():
    assert stats.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
