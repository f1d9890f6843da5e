"""Models (:class:`Model` says what that is): on wavelet coefficients, and on tokens."""

from __future__ import annotations

import torch
from torch import nn

from ..config import DetectorConfig
from .base import Model
from .coefficients import CoefficientModel
from .tokens import TokenModel, places

__all__ = ["CoefficientModel", "Model", "TokenModel", "create", "places"]


def create(
    config: DetectorConfig,
    device: torch.device,
    denoiser: nn.Module | None = None,
    features: nn.Module | None = None,
) -> Model:
    """The model for ``config``. Raises InputError for what does not go together."""
    if config.on_tokens:
        return TokenModel(config, device, features)
    return CoefficientModel(config, device, denoiser, features)
