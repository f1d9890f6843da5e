from __future__ import annotations

import numpy as np
import pytest

from diffad_fast.data import resampling
from diffad_fast.data.resampling import Resampler, resampling_delay

pytest.importorskip("soxr")


@pytest.mark.parametrize("own", [1000, 2000, 4000, 8000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("size", [97, 1001])
def test_the_delay_of_resampling_is_the_largest(own, size):
    delay, resampler = resampling_delay(own, 16000), Resampler(own, 16000, "x")
    assert resampling_delay(own, own) == 0
    given, found, longest = 0, 0, 0.0
    while given < 9 * own:
        given += size
        found += len(resampler.push(np.zeros(size, np.float32)))
        longest = max(longest, given / own - found / 16000)
    assert longest <= delay < 1.1 * longest + size / own


def test_the_delay_is_measured_once(monkeypatch):
    delay = resampling_delay(1000, 16000)
    monkeypatch.setattr(resampling, "Resampler", None)
    assert resampling_delay(1000, 16000) == delay
