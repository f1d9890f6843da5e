"""Models: a representation, its denoiser, how both are trained and what they say of a batch.

A model has ``learn(source, split, kept)``, ``raw_maps(x)``, ``use(statistics)``, ``score(x)``,
``state()`` and ``restore(tensors)``; :class:`diffad_fast.Detector` does everything else: opening
data, splitting, calibrating, checkpoints.
"""

from __future__ import annotations

import torch
from torch import nn

from ..config import DetectorConfig
from .coefficients import CoefficientModel
from .tokens import TokenModel, places

__all__ = ["CoefficientModel", "TokenModel", "create", "places"]


def create(
    config: DetectorConfig,
    device: torch.device,
    denoiser: nn.Module | None = None,
    features: nn.Module | None = None,
) -> CoefficientModel | TokenModel:
    """The model for ``config``. Raises InputError for what does not go together."""
    if config.on_tokens:
        return TokenModel(config, device, features)
    return CoefficientModel(config, device, denoiser, features)
