"""A diffusers UNet2DModel as a denoiser."""

from __future__ import annotations

import torch
from torch import nn


class DiffusersUNet(nn.Module):
    """``unet(x, timestep)`` of diffusers, asked at the timestep whose level is nearest.

    unet: a ``UNet2DModel`` or a module with the same call, whose result has ``.sample``.
    alphas_cumprod: (T,) its scheduler's table. ``forward(x (N,C,h,w), log_sigma (N,))`` gives the
    prediction, of the shape of x. The search runs on the device, without waiting for it.
    """

    def __init__(self, unet: nn.Module, alphas_cumprod: torch.Tensor):
        super().__init__()
        self.unet = unet
        alpha = alphas_cumprod.double()
        log_sigma = 0.5 * (torch.log1p(-alpha) - torch.log(alpha))
        # Timestep t serves the levels between the middles to its neighbours.
        self.register_buffer("borders", ((log_sigma[1:] + log_sigma[:-1]) / 2).float())

    def forward(self, x: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        t = torch.searchsorted(self.borders, log_sigma.float().contiguous())
        return self.unet(x, t).sample
