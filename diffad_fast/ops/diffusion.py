"""The forward process and the DDIM step."""

from __future__ import annotations

import torch

from .. import reference
from . import checks
from .dispatch import Operator


def _triton_q_sample(*arguments):
    from ..kernels.q_sample import q_sample

    return q_sample(*arguments)


_q_sample = Operator("q_sample", reference.q_sample, triton=_triton_q_sample)
_ddim_step = Operator("ddim_step", reference.ddim_step)

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def q_sample(x0, t, noise, alphas_cumprod):
    """Noised samples ``sqrt(abar[t]) x0 + sqrt(1 - abar[t]) noise`` (Ho et al. 2020, eq. 4).

    x0: (N,...); t: (N,) int64, indices into the table ``alphas_cumprod`` (T,) of any floating
    dtype; noise: the shape of ``x0``, or 1 in place of N. All on one device. Returns the shape
    and dtype of ``x0``; computed in float32 at least. Differentiable in x0 and noise.

    Raises TypeError for dtypes, ValueError for shapes and devices. Values of ``t`` are not checked.
    """
    check_forward(x0, t, noise, alphas_cumprod)
    return _q_sample(x0, t, noise, alphas_cumprod)


def check_forward(x0, t, noise, alphas_cumprod):
    """Check the arguments of the forward process; see :func:`q_sample`."""
    checks.tensor("x0", x0)
    if x0.ndim == 0:
        raise ValueError("x0 must have a leading batch dimension, got a scalar")
    if not isinstance(t, torch.Tensor) or t.dtype != torch.int64:
        raise TypeError(f"t must be an int64 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if tuple(t.shape) != (len(x0),):
        raise ValueError(f"t must have shape ({len(x0)},), one a sample, got {tuple(t.shape)}")
    checks.on_device("t", t, x0.device)
    _check_noise(noise, x0, "x0")
    checks.tensor("alphas_cumprod", alphas_cumprod, 1)
    checks.on_device("alphas_cumprod", alphas_cumprod, x0.device)


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
    """One step of DDIM from the level of ``x_t`` to another (Song, Meng, Ermon 2021, eq. 12).

    x_t, model_output: (N,...). alpha_t, alpha_s: cumulative products of 1 - beta at the source
    and at the target, floats or tensors (N,) or () in (0, 1]. alpha_s > alpha_t denoises,
    alpha_s = 1 ends the process, alpha_s < alpha_t inverts it (eta = 0 only). alpha_t = 1 is
    allowed only where nothing is divided by sqrt(1 - alpha_t): with "epsilon" and "v_prediction",
    without ``use_clipped_model_output``, at eta = 0.

    prediction_type: "epsilon", "sample" or "v_prediction", what ``model_output`` is.
    eta: in [0, 1]; 0 is deterministic, 1 ancestral sampling. eta > 0 needs ``noise``, standard
    normal of the shape of ``x_t`` or with 1 in place of N.
    clip: limits the predicted x0 to [-clip, clip].
    dynamic_threshold: (ratio, max): s = the quantile ``ratio`` of |x0| over a sample, within
    [1, max]; x0 is limited to [-s, s] and divided by s (Saharia et al. 2022). Not with ``clip``.
    use_clipped_model_output: epsilon is computed again from the limited x0.
    guidance: (y, w): pulls towards y, of the shape of ``x_t``, with weight w (DDAD, Mousakhan et
    al. 2023), before limiting.

    Returns x_s in the shape and dtype of ``x_t``; computed in float32 at least. The equations
    are in ``reference.ddim_step``. Differentiable in the tensors.

    Raises TypeError for dtypes, ValueError for shapes, devices and options. Values of tensors
    are not checked.
    """
    checks.tensor("x_t", x_t)
    if x_t.ndim == 0:
        raise ValueError("x_t must have a leading batch dimension, got a scalar")
    checks.shaped("model_output", model_output, x_t.shape, x_t.device)
    for name, alpha in (("alpha_t", alpha_t), ("alpha_s", alpha_s)):
        if isinstance(alpha, torch.Tensor):
            if alpha.ndim:
                checks.shaped(name, alpha, (len(x_t),), x_t.device)
            else:
                checks.tensor(name, alpha)
        else:
            checks.number(name, alpha, 0.0, 1.0)
            if alpha == 0:
                raise ValueError(f"{name} must be above 0, got 0: nothing is left of the signal")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}: choose {', '.join(PREDICTION_TYPES)}"
        )
    checks.number("eta", eta, 0.0, 1.0)
    if eta > 0:
        if noise is None:
            raise ValueError(f"eta = {eta} needs noise: pass noise=, for example philox_normal")
        floats = not isinstance(alpha_t, torch.Tensor) and not isinstance(alpha_s, torch.Tensor)
        if floats and not alpha_t <= alpha_s:
            raise ValueError(
                f"eta = {eta} with alpha_s = {alpha_s} below alpha_t = {alpha_t}: inversion is "
                f"deterministic, use eta=0"
            )
    if noise is not None:
        _check_noise(noise, x_t, "x_t")
    if clip is not None:
        checks.number("clip", clip, 0.0)
    if dynamic_threshold is not None:
        if clip is not None:
            raise ValueError(f"choose one of clip = {clip} and dynamic_threshold, not both")
        if len(dynamic_threshold) != 2:
            raise ValueError(f"dynamic_threshold must be (ratio, max), got {dynamic_threshold!r}")
        checks.number("the ratio of dynamic_threshold", dynamic_threshold[0], 0.0, 1.0)
        checks.number("the maximum of dynamic_threshold", dynamic_threshold[1], 1.0)
    if guidance is not None:
        if not isinstance(guidance, (tuple, list)) or len(guidance) != 2:
            raise ValueError(f"guidance must be (y, w), got {type(guidance).__name__}")
        checks.shaped("the y of guidance", guidance[0], x_t.shape, x_t.device)
        checks.number("the w of guidance", guidance[1], -float("inf"))
    return _ddim_step(
        x_t,
        model_output,
        alpha_t,
        alpha_s,
        prediction_type,
        eta,
        noise,
        clip,
        dynamic_threshold,
        use_clipped_model_output,
        guidance,
    )


def _check_noise(noise, x, name):
    checks.tensor("noise", noise)
    if tuple(noise.shape) not in (tuple(x.shape), (1, *x.shape[1:])):
        raise ValueError(
            f"noise must have the shape of {name}, {tuple(x.shape)}, or 1 in place of its first "
            f"entry, got {tuple(noise.shape)}"
        )
    checks.on_device("noise", noise, x.device)
