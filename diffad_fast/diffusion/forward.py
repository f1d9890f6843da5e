"""What a denoiser is trained on, beside the noised input itself (``ops.q_sample``)."""

from __future__ import annotations

import torch


def velocity(
    x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """v = sqrt(alpha_t) noise - sqrt(1 - alpha_t) x0 (Salimans & Ho 2022).

    x0, noise (N,...) of one shape, t (N,) int64, alphas_cumprod (T,); returns the shape of x0.
    """
    alpha = alphas_cumprod[t].view(-1, *[1] * (x0.dim() - 1))
    return alpha.sqrt().to(x0.dtype) * noise - (1 - alpha).sqrt().to(x0.dtype) * x0


def training_target(
    prediction_type: str,
    x0: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """What the network shall predict, of the shape of x0: the noise, x0 or the velocity."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    return velocity(x0, t, noise, alphas_cumprod)


def min_snr_weight(
    prediction_type: str, t: torch.Tensor, alphas_cumprod: torch.Tensor, limit: float = 5.0
) -> torch.Tensor:
    """Per-sample loss weights (N,) float32 of the min-SNR strategy (Hang et al. 2023).

    The strategy weighs the squared error of x0 by min(SNR, limit). That error is the error of v
    times 1/(SNR + 1) and the error of the noise times 1/SNR, which gives the weights here.
    """
    alpha = alphas_cumprod[t].double()
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=limit)
    if prediction_type == "epsilon":
        weight = weight / snr
    elif prediction_type == "v_prediction":
        weight = weight / (snr + 1)
    return weight.float()
