"""What a usable wave is: one channel of floats, as long as whole windows."""

from __future__ import annotations

import numpy as np
import torch

from ..arrays import check_unmasked, to_numpy
from ..errors import InputError

# More columns of a two-dimensional array than this are samples, not channels.
MOST_CHANNELS = 32
# Floats are in [-1, 1], a little more after resampling or mixing; far more is a forgotten scale.
_LARGEST_VALUE = 16.0


def as_mono(wave, name: str, *, channels_last: bool = False) -> np.ndarray:
    """A wave as (samples,) float32; channels are averaged. Of two axes these are the shorter one,
    or always the last, where a wave may be shorter than it has channels.

    Raises InputError for another shape or dtype, no samples, masked ones, NaN, or values far beyond
    [-1, 1].
    """
    if isinstance(wave, torch.Tensor):
        wave = to_numpy(wave)
    if not isinstance(wave, np.ndarray):
        raise InputError(
            f"{name} is a {type(wave).__name__}: give an array or a tensor"
            + ("." if channels_last else ", or a pair (wave, rate).")
        )
    check_unmasked(wave, f"{name} has", "fill them, or leave it out.")
    if wave.ndim not in (1, 2):
        raise InputError(f"{name} has shape {wave.shape}: a wave has (samples,) or channels too.")
    if 0 in wave.shape:
        raise InputError(f"{name} of shape {wave.shape} holds no samples: leave it out.")
    if wave.dtype.kind == "i" and wave.dtype.itemsize in (2, 4):
        wave = wave / np.float32(-float(np.iinfo(wave.dtype).min))
    elif wave.dtype.kind != "f":
        raise InputError(
            f"{name} has dtype {wave.dtype}: convert it to floats in [-1, 1], int16 or int32."
        )
    if channels_last and wave.ndim == 2 and wave.shape[1] > MOST_CHANNELS:
        raise InputError(
            f"{name} of shape {wave.shape} would have {wave.shape[1]} channels, more than "
            f"{MOST_CHANNELS}: transpose it, or mix it down."
        )
    if not channels_last and wave.ndim == 2 and wave.shape[0] < wave.shape[1]:
        wave = wave.T
    return mono(wave[:, None] if wave.ndim == 1 else wave, name)


def mono(wave: np.ndarray, name: str) -> np.ndarray:
    """(samples, channels) of floats to (samples,) float32, unless they are of no use."""
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
    wave = np.ascontiguousarray(wave, dtype=np.float32)
    low, high = wave.min(initial=0), wave.max(initial=0)  # either is NaN if a sample is
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{name} has NaN or infinite samples: replace them or leave it out.")
    peak = max(high, -low)
    if peak > _LARGEST_VALUE:
        raise InputError(
            f"{name} has samples up to {peak:.6g}: floats must lie in [-1, 1], so rescale them."
        )
    return wave


def extended(wave: np.ndarray, window: int, step: int) -> np.ndarray:
    """The wave (samples,) at a length of window + k step: repeated up to a window, or its end
    mirrored."""
    short = len(wave)
    target = window + max(0, -(-(short - window) // step)) * step
    if short == target:
        return wave
    if short < window:
        return np.resize(wave, window)
    if target >= 2 * short:  # more than once
        return np.pad(wave, (0, target - short), mode="reflect")
    whole = np.empty(target, wave.dtype)
    whole[:short] = wave
    whole[short:] = wave[-2 : short - target - 2 : -1]
    return whole
