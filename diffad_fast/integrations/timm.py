"""Feature maps of pretrained timm models, for ``Detector(features="resnet18")``."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import BackendError, InputError
from ._host import require


class TimmFeatures(nn.Module):
    """Images (N,C,H,W) in [0,1] -> the feature maps of a timm model, fine to coarse.

    The images are standardised as those that it was pretrained on: by its own mean and deviation of
    three channels, or, for another number of channels, for which timm adds up or repeats the first
    layer's weights, by the average of these. Raises InputError for a model that timm does not have,
    cannot load or that has no feature maps; BackendError without timm.
    """

    def __init__(self, name: str, channels: int):
        super().__init__()
        try:
            timm = require("timm")
        except ImportError as error:
            raise BackendError(
                f"features={name!r} names a timm model: {error}, or pass a module instead"
            ) from None
        try:
            self.model = timm.create_model(
                name, pretrained=True, features_only=True, in_chans=channels
            )
        except (RuntimeError, ValueError, OSError, AttributeError) as error:
            raise InputError(f"timm cannot make features={name!r}: {error}") from None
        config = timm.data.resolve_model_data_config(self.model)
        for statistic in ("mean", "std"):
            values = torch.tensor(config[statistic])
            if channels != len(values):
                values = values.mean().expand(channels)
            self.register_buffer(statistic, values[:, None, None].clone(), persistent=False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.model((images - self.mean) / self.std)
