"""Raw input to the tensor that is diffused, and back."""

from __future__ import annotations

from torch import nn

from ..config import DetectorConfig
from .embedding import WindowEmbedding
from .logmel import AudioTokens, LogMel
from .tokens import ImageTokens, Preprocessing, feature_maps
from .vector import VectorTokens
from .wavelet import WaveletRepresentation

__all__ = [
    "AudioTokens",
    "ImageTokens",
    "LogMel",
    "Preprocessing",
    "VectorTokens",
    "WaveletRepresentation",
    "WindowEmbedding",
    "create_tokens",
    "feature_maps",
]


def create_tokens(config: DetectorConfig, features: nn.Module | None = None) -> nn.Module:
    """The token representation for ``config``, not yet fitted.

    It has ``fit(batches)``, ``encode(x)``, which gives a grid of tokens (N,h,w,dim) for each of its
    sources, and ``dims``.
    """
    if config.kind == "vector":
        return VectorTokens(config.feature_scale)
    if config.kind == "audio":
        logmel = LogMel(
            config.sample_rate, config.n_fft, config.hop, config.n_mels, config.fmin, config.fmax
        )
        return AudioTokens(logmel, config.window_frames, config.window_step, config.remove_level)
    preprocessing = Preprocessing(config.intensity, config.illumination, config.image_scale)
    return ImageTokens(config.tokens, config.image_size, preprocessing, features)
