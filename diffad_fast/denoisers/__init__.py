"""Networks (x_t, log sigma) -> prediction, with the multi-scale features on the way."""

from __future__ import annotations

from ..errors import InputError
from .wavelet_unet import UNET_SIZES, WaveletUNet

__all__ = ["UNET_SIZES", "WaveletUNet", "create"]


def create(name: str, channels: int) -> WaveletUNet:
    """The denoiser of that name for inputs of ``channels`` channels. Raises InputError."""
    if name not in UNET_SIZES:
        raise InputError(f"unknown denoiser {name!r}: choose {', '.join(UNET_SIZES)}, or a module")
    return WaveletUNet(channels, **UNET_SIZES[name])
