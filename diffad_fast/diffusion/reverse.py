"""The reverse process: from a represented input to the model's idea of it without its anomaly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import ops
from .schedule import ReverseStep


def reconstruct(
    denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x0: torch.Tensor,
    steps: Sequence[ReverseStep],
    *,
    seed: int,
    prediction_type: str = "v_prediction",
    eta: float = 0.0,
    clip: float | None = None,
    guidance: float = 0.0,
) -> torch.Tensor:
    """Noise ``x0`` to the level of ``steps[0]`` and go back by DDIM (Song et al. 2021, eq. 12).

    x0: (N,...) represented input. ``denoiser(x_t, log_sigma)`` with log_sigma (N,) float32 gives
    the prediction. The noise is the same field for every sample, so that a sample's result does
    not depend on its neighbours. ``eta`` > 0 adds fresh noise at each step; ``guidance`` pulls
    towards x0 (DDAD, Mousakhan et al. 2023). Returns x0's estimate, of the shape of x0.
    """
    shape = (1, *x0.shape[1:])

    def noise(step: int) -> torch.Tensor:
        field = ops.philox_normal(shape[1:], seed, step=step, device=x0.device)
        return field.to(x0.dtype).expand(x0.shape)

    start = torch.tensor([steps[0].alpha_t], dtype=torch.float64, device=x0.device)
    first = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    x_t = ops.q_sample(x0, first, noise(0), start)
    for i, step in enumerate(steps):
        log_sigma = torch.full((len(x0),), step.log_sigma, device=x0.device)
        output = denoiser(x_t, log_sigma)
        x_t = ops.ddim_step(
            x_t,
            output,
            step.alpha_t,
            step.alpha_s,
            prediction_type=prediction_type,
            eta=eta,
            noise=noise(i + 1) if eta > 0 else None,
            clip=clip,
            guidance=(x0, guidance) if guidance > 0 else None,
        )
    return x_t
