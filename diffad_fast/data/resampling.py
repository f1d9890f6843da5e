"""Waves of one sampling rate to another, by soxr."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from ..config import RATES
from ..errors import BackendError, InputError


class Resampler:
    """Blocks of a wave at one rate to blocks at another, without seams.

    Raises InputError, naming `name`, for a source_rate outside `config.RATES`, and BackendError
    where the rates differ and soxr is not installed.
    """

    def __init__(self, source_rate: float, rate: int, name: str):
        check_rate(source_rate, name)
        self._stream = None
        if source_rate != rate:
            soxr = audio_package("soxr")
            self._stream = soxr.ResampleStream(source_rate, rate, 1, dtype="float32")

    def push(self, wave: np.ndarray) -> np.ndarray:
        """What can be given after one more block (samples,) float32."""
        return wave if self._stream is None else self._stream.resample_chunk(wave)

    def finish(self) -> np.ndarray:
        """The rest."""
        none = np.empty(0, np.float32)
        return none if self._stream is None else self._stream.resample_chunk(none, last=True)


@cache
def resampling_delay(source_rate: float, rate: int) -> float:
    """Seconds by which a `Resampler` lags behind at most, whatever the size of the chunks."""
    if source_rate == rate:
        return 0.0
    # soxr does not tell it, so it is measured. Its filters take up to 1.4 s, and its blocks drift
    # against the samples for some seconds more.
    resampler, longest, given, found = Resampler(source_rate, rate, "the delay"), 0.0, 0, 0
    block = np.zeros(math.ceil(source_rate / 1000), np.float32)
    while given < 10 * source_rate:
        given += len(block)
        # Before the block's last sample is there, when none of its results are.
        longest = max(longest, given / source_rate - found / rate)
        found += len(resampler.push(block))
    return longest


def check_rate(rate, name: str) -> None:
    """Raise InputError unless `rate` is a number of samples a second within `config.RATES`."""
    number = isinstance(rate, (int, float, np.number)) and not isinstance(rate, (bool, np.bool_))
    if not number or not RATES[0] <= rate <= RATES[1]:
        raise InputError(
            f"{name} has the rate {rate!r}: give samples a second, {RATES[0]:,} to {RATES[1]:,}."
        )


@cache
def audio_package(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise BackendError(
            f"audio needs the package {name} ({error}): pip install 'diffad_fast[audio]'"
        ) from None
