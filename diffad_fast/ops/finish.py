"""The last step of a reverse process over Haar packets, with all that follows from its state."""

from __future__ import annotations

import torch

from .. import native, reference
from ..reference import Finish
from . import checks
from .diffusion import PREDICTION_TYPES, check_step
from .dispatch import Operator
from .haar import MAX_LEVEL
from .layout import empty_4d

__all__ = ["Finish", "ddim_finish"]


def _native(
    x_t, model_output, alpha_t, images, mean, deviation, level, prediction_type, clip, guidance,
    clamp,
):  # fmt: skip
    """The operator; the reference where gradients are wanted."""
    guide, weight = guidance or (None, 0.0)
    given = [x_t, model_output, images, mean, deviation, *([] if guide is None else [guide])]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return reference.ddim_finish(
            x_t, model_output, alpha_t, images, mean, deviation, level, prediction_type, clip,
            guidance, clamp,
        )  # fmt: skip
    return Finish(
        *torch.ops.diffad_fast.ddim_finish(
            x_t,
            model_output,
            guide,
            images,
            mean.contiguous(),
            deviation.contiguous(),
            alpha_t,
            level,
            PREDICTION_TYPES.index(prediction_type),
            weight,
            float("inf") if clip is None else clip,
            clamp,
        )
    )


def _cuda_refuses(x_t, model_output, *_):
    wide = torch.float64 in (x_t.dtype, model_output.dtype)
    return "the CUDA kernel computes in float32, not float64" if wide else None


_ddim_finish = Operator(
    "ddim_finish",
    reference.ddim_finish,
    **dict.fromkeys(native.implementations("ddim_finish"), _native),
    refuses={"cuda": _cuda_refuses},
)


def ddim_finish(
    x_t,
    model_output,
    alpha_t,
    images,
    mean,
    deviation,
    level=1,
    prediction_type="epsilon",
    clip=None,
    guidance=None,
    clamp=False,
):
    """End a reverse process over standardised Haar packets: the last DDIM step (to abar = 1), the
    image that its state stands for, and the residual maps against the input, in one pass.

    x_t, model_output: (N, 4^level C, H/2^level, W/2^level), the state in float32 or float64.
    alpha_t: abar_t, a number; it, prediction_type, clip and guidance are as in
    :func:`ddim_step`. No noise is added at the last step whatever eta.
    images: (N,C,H,W), the input, in the dtype of ``x_t``. mean, deviation: those of each
    coefficient's channel, (4^level C,), in that dtype. level: 0 (a state is an image) to 4.
    clamp: keep the image within [0, 1].

    Returns a :class:`Finish`: ``x0``, the clean state; ``x_hat`` (N,C,H,W), contiguous; ``pixel``
    and ``sub_band``, the maps D_p and D_w (N,H,W) of :func:`anomaly_map` with ``levels=level``,
    neither standardised nor smoothed; all in the dtype of ``x_t``. The equations are in
    ``reference.ddim_finish``. Differentiable: a call that needs gradients is served by the
    reference on every backend.

    Raises TypeError for dtypes, ValueError for shapes, devices and options.
    """
    checks.tensor("x_t", x_t, 4)
    if x_t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x_t must be float32 or float64, got {x_t.dtype}: the state is kept wide")
    check_step(x_t, model_output, alpha_t, 1.0, prediction_type, clip, guidance)
    if isinstance(alpha_t, torch.Tensor):
        raise TypeError("alpha_t must be a number, got a tensor: all samples are at one level")
    level = checks.integer("level", level, 0, MAX_LEVEL)
    n, channels, height, width = x_t.shape
    if channels == 0 or channels % 4**level:
        raise ValueError(
            f"x_t has {channels} channels, which must divide by {4**level} for level {level}"
        )
    scale = 2**level
    checks.shaped(
        "images", images, (n, channels // 4**level, height * scale, width * scale), x_t.device
    )
    checks.same_dtype("images", images, "x_t", x_t.dtype)
    for name, each in (("mean", mean), ("deviation", deviation)):
        checks.shaped(name, each, (channels,), x_t.device)
        checks.same_dtype(name, each, "x_t", x_t.dtype)
    return _ddim_finish(
        x_t, model_output, float(alpha_t), images, mean, deviation, level, prediction_type, clip,
        guidance, bool(clamp),
    )  # fmt: skip


def _fake(x_t, model_output, guide, images, *_):
    maps = [images.new_empty(images[:, 0].shape) for _ in range(2)]
    x_hat = torch.empty_like(images, memory_format=torch.contiguous_format)
    return empty_4d(x_t, x_t.shape), x_hat, *maps


if native.loaded():
    torch.library.register_fake("diffad_fast::ddim_finish", _fake)
