"""The forward process and the DDIM step."""

from __future__ import annotations

import math

import torch

# In the order of the C++ enumeration Prediction.
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def q_sample(x0, t, noise, alphas_cumprod):
    """``sqrt(abar[t]) x0 + sqrt(1 - abar[t]) noise`` for t (N,); Ho et al. 2020, eq. 4.

    Roots are taken in the dtype of the table (at least float32), the sum in that of ``x0`` (at
    least float32); the result has the dtype of ``x0``.
    """
    compute = torch.promote_types(x0.dtype, torch.float32)
    alpha = alphas_cumprod.to(torch.promote_types(alphas_cumprod.dtype, torch.float32))[t]
    alpha = alpha.reshape(-1, *[1] * (x0.ndim - 1))
    signal, spread = alpha.sqrt().to(compute), (1 - alpha).sqrt().to(compute)
    return (signal * x0.to(compute) + spread * noise.to(compute)).to(x0.dtype)


def ddim_step(
    x_t,
    model_output,
    alpha_t,
    alpha_s,
    prediction_type="epsilon",
    eta=0.0,
    noise=None,
    clip=None,
    dynamic_threshold=None,
    use_clipped_model_output=False,
    guidance=None,
):
    """x_s from x_t by Song, Meng, Ermon 2021, eq. 12; a = abar_t and b = abar_s::

        epsilon:       e = m,                          x0 = (x_t - sqrt(1-a) e) / sqrt(a)
        sample:        x0 = m,                         e = (x_t - sqrt(a) x0) / sqrt(1-a)
        v_prediction:  x0 = sqrt(a) x_t - sqrt(1-a) m, e = sqrt(a) m + sqrt(1-a) x_t

        guidance (y, w):    y_t = sqrt(a) y + sqrt(1-a) e
                            e <- e - w sqrt(1-a) (y_t - x_t),  x0 = (x_t - sqrt(1-a) e) / sqrt(a)
        clip c:             x0 <- min(max(x0, -c), c)
        dynamic threshold:  s = quantile of |x0| over an image, within [1, max]
                            x0 <- min(max(x0, -s), s) / s
        use_clipped_model_output:  e = (x_t - sqrt(a) x0) / sqrt(1-a)  from that x0

        sigma = eta sqrt((1-b) / (1-a)) sqrt(1 - a/b)
        x_s = sqrt(b) x0 + sqrt(1 - b - sigma^2) e + sigma noise

    Coefficients are computed in float64, the rest in the dtype of ``x_t`` or float32, whichever
    is wider; the result has the dtype of ``x_t``.
    """
    compute = torch.promote_types(x_t.dtype, torch.float32)
    a, b = (_column(alpha, x_t.ndim) for alpha in (alpha_t, alpha_s))
    signal, spread = a.sqrt().to(compute), (1 - a).sqrt().to(compute)
    x, m = x_t.to(compute), model_output.to(compute)

    if prediction_type == "epsilon":
        epsilon = m
        x0 = (x - spread * epsilon) / signal
    elif prediction_type == "sample":
        x0 = m
        epsilon = (x - signal * x0) / spread
    elif prediction_type == "v_prediction":
        x0 = signal * x - spread * m
        epsilon = signal * m + spread * x
    else:
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}: choose {', '.join(PREDICTION_TYPES)}"
        )

    if guidance is not None:
        y, w = guidance
        y_t = signal * y.to(compute) + spread * epsilon
        epsilon = epsilon - w * spread * (y_t - x)
        x0 = (x - spread * epsilon) / signal

    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    elif dynamic_threshold is not None:
        x0 = _threshold(x0, *dynamic_threshold)
    if use_clipped_model_output:
        epsilon = (x - signal * x0) / spread

    if eta == 0:  # by branch: for s > t (inversion) the root in sigma is imaginary
        x_s = b.sqrt().to(compute) * x0 + (1 - b).sqrt().to(compute) * epsilon
    else:
        variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        # 1 - b - sigma^2 = (1-b) (1 - eta^2 (1 - r)) >= 0 with r = a (1-b) / (b (1-a)), the ratio
        # of the signal-to-noise ratios; rounding must not take it below 0 where r is tiny.
        rest = (1 - b - variance).clamp(min=0).sqrt().to(compute)
        x_s = b.sqrt().to(compute) * x0 + rest * epsilon
        x_s = x_s + variance.sqrt().to(compute) * noise.to(compute)
    return x_s.to(x_t.dtype)


def _column(alpha, ndim):
    """In float64: a float as a scalar on the CPU, a tensor (N,) as (N,1,1,..)."""
    if not isinstance(alpha, torch.Tensor):
        return torch.tensor(alpha, dtype=torch.float64, device="cpu")
    # A scalar tensor stays one, which torch lets meet tensors of any device.
    return alpha.double().reshape(-1, *[1] * (ndim - 1)) if alpha.ndim else alpha.double()


def _threshold(x0, ratio, largest):
    """Dynamic thresholding (Imagen, Saharia et al. 2022, section 2.3), s at most ``largest``."""
    # By its shape: len is a number to torch.export, which traces batches of any length.
    magnitude = x0.reshape(x0.shape[0], math.prod(x0.shape[1:])).abs().sort(dim=1).values
    # The quantile with linear interpolation; torch.quantile refuses large tensors.
    position = ratio * (magnitude.shape[1] - 1)
    below = int(position)
    above = min(below + 1, magnitude.shape[1] - 1)
    s = torch.lerp(magnitude[:, below], magnitude[:, above], position - below)
    s = s.clamp(1, largest).reshape(-1, *[1] * (x0.ndim - 1))
    return torch.maximum(torch.minimum(x0, s), -s) / s
