"""Raw input to the tensor that is diffused, and back."""

from __future__ import annotations

from torch import nn

from ..config import DetectorConfig, token_source
from ..errors import InputError
from .tokens import BackboneFeatures, ImageTokens, Preprocessing, haar_patches, sub_band_energies
from .vector import VectorTokens
from .wavelet import WaveletRepresentation

__all__ = [
    "ImageTokens",
    "Preprocessing",
    "VectorTokens",
    "WaveletRepresentation",
    "create_tokens",
]


def create_tokens(config: DetectorConfig, features: nn.Module | None = None) -> list[nn.Module]:
    """The token representations that ``config`` names, not yet fitted.

    Each has ``fit(batches)``, ``encode(x) -> (N,h,w,dim)``, ``dim`` and ``cell``, the side in
    pixels of what a token stands for. Raises InputError for ``features`` without a backbone.
    """
    if config.kind == "vector":
        return [VectorTokens(config.feature_scale)]
    result: list[nn.Module] = []
    for name in config.tokens:
        kind, cell = token_source(name)
        if kind == "features":
            if features is None:
                raise InputError(
                    "tokens='features' reads a backbone: pass features=module, or the name of a "
                    "timm model"
                )
            result.append(ImageTokens(BackboneFeatures(features), cell, None, neighbours=False))
            continue
        raw = {"energy": sub_band_energies, "patch": haar_patches}[kind]
        preprocessing = Preprocessing(config.intensity, config.illumination, config.image_scale)
        result.append(
            ImageTokens(
                lambda x, raw=raw, cell=cell: raw(x, cell),
                cell,
                preprocessing,
                neighbours=kind == "energy",
            )
        )
    return result
