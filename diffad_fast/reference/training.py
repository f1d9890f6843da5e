"""What a denoiser is trained on, and its loss."""

from __future__ import annotations

import torch


def noised_target(x0, t, noise, alphas_cumprod, prediction_type="v_prediction", snr_limit=5.0):
    """x0, noise (N,...), t (N,) -> x_t and target (N,...), weight (N,); with a = abar[t], ::

        x_t = sqrt(a) x0 + sqrt(1 - a) noise                       (Ho et al. 2020, eq. 4)
        target = noise, x0 or v = sqrt(a) noise - sqrt(1 - a) x0   (Salimans & Ho 2022)

    and the weights of min-SNR (Hang et al. 2023), which takes the squared error of x0 min(SNR,
    limit) times, SNR = a / (1 - a). That error is the error of v times 1 / (SNR + 1) and the error
    of the noise times 1 / SNR, hence ::

        weight = min(SNR, limit) times 1 / SNR, 1 or 1 / (SNR + 1)   (epsilon, sample, v)

    Coefficients are computed in float64, the rest in the dtype of ``x0`` or float32, whichever is
    wider; x_t and target have the dtype of ``x0``, the weight is float32.
    """
    compute = torch.promote_types(x0.dtype, torch.float32)
    alpha = alphas_cumprod.double()[t]
    weight = min_snr_weight(alpha, prediction_type, snr_limit)
    column = alpha.reshape(-1, *[1] * (x0.ndim - 1))
    signal, spread = column.sqrt().to(compute), (1 - column).sqrt().to(compute)
    x, z = x0.to(compute), noise.to(compute)
    x_t = (signal * x + spread * z).to(x0.dtype)
    if prediction_type == "epsilon":
        return x_t, noise.expand_as(x0).to(x0.dtype), weight
    if prediction_type == "sample":
        return x_t, x0, weight
    return x_t, (signal * z - spread * x).to(x0.dtype), weight


def min_snr_weight(alpha, prediction_type, snr_limit):
    """The weight of :func:`noised_target`, float32, for abar in float64."""
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=snr_limit)
    if prediction_type == "epsilon":
        weight = (snr_limit / snr).clamp(max=1)  # also at a = 0
    elif prediction_type == "v_prediction":
        weight = weight / (snr + 1)
    return weight.float()


def weighted_mse(prediction, target, weight):
    """prediction, target (N,...), weight (N,) -> mean over samples of weight times mean square
    error; in float32 at least."""
    compute = torch.promote_types(prediction.dtype, torch.float32)
    error = prediction.to(compute) - target.to(compute)
    return (error.square().reshape(len(error), -1).mean(dim=1) * weight.to(compute)).mean()
