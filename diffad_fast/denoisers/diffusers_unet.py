"""A diffusers UNet2DModel as a denoiser."""

from __future__ import annotations

import threading

import torch
from torch import nn

from ..diffusion.schedule import log_sigma


class DiffusersUNet(nn.Module):
    """``unet(x, timestep)`` of diffusers, asked at the timestep whose level is nearest.

    unet: a ``UNet2DModel`` or a module with the same call, whose result has ``.sample``.
    alphas_cumprod: (T,) its scheduler's table. ``forward(x (N,C,h,w), log_sigma (N,))`` gives the
    prediction, of the shape of x. The search runs on the device, without waiting for it, and in a
    ``ReverseLoop`` once for all levels. ``features`` are what the U-Net's down blocks and its
    middle give, fine to coarse.
    """

    def __init__(self, unet: nn.Module, alphas_cumprod: torch.Tensor):
        super().__init__()
        self.unet = unet
        # A level without signal has an infinite sigma; its border to the last one has not.
        alpha = alphas_cumprod.double().clamp(min=torch.finfo(torch.float64).tiny)
        levels = log_sigma(alpha)
        # Timestep t serves the levels between the middles to its neighbours.
        self.register_buffer("borders", ((levels[1:] + levels[:-1]) / 2).float())

    def forward(self, x: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        return self.denoise(x, self.conditioning(log_sigma))

    def conditioning(self, log_sigma: torch.Tensor) -> torch.Tensor:
        """Levels to timesteps, int64."""
        return torch.searchsorted(self.borders, log_sigma.float().contiguous())

    def denoise(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` from timesteps (N,)."""
        return self.unet(x, timestep).sample

    def features(self, x: torch.Tensor, log_sigma: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of the encoder, for a detector. The decoder runs too."""
        found, mine = [], threading.get_ident()

        def keep(module, args, output):
            if threading.get_ident() == mine:  # the U-Net is that of other threads, too
                found.append(output[0] if isinstance(output, tuple) else output)

        blocks = [*self.unet.down_blocks, *filter(None, [self.unet.mid_block])]
        hooks = [block.register_forward_hook(keep) for block in blocks]
        try:
            self(x, log_sigma)
        finally:
            for hook in hooks:
                hook.remove()
        return found
