"""Images as standardised Haar coefficients, and the same noised: what a detector computes before
its network does. In Triton each is one pass, where the operators that they consist of take three to
five; in C++, for grey and colour images, the first is one and the second two."""

from __future__ import annotations

import torch

from .. import native, reference
from ..reference.packet import standardised
from . import checks
from .diffusion import check_noising
from .dispatch import Operator, kernel
from .haar import MAX_LEVEL, check_divides, haar_pack
from .training import check_target, noised_target


def _cpu_packet(x, mean, deviation, level):
    """In one pass for grey and colour images; else by the operators that it consists of."""
    y = channels_last(x)
    if level and x.shape[1] in (1, 3) and not _refuses(x, mean, deviation):
        return torch.ops.diffad_fast.standardised_packet(y, mean, deviation, level)
    y = y.to(torch.promote_types(x.dtype, torch.float32))
    return standardised(haar_pack(y, level) if level else y, mean, deviation).to(x.dtype)


def _cpu_noised(x, mean, deviation, t, noise, alphas, level, prediction_type, snr_limit):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x0 = _cpu_packet(wide, mean, deviation, level)
    noise = noise.contiguous(memory_format=torch.channels_last)
    x_t, target, weight = noised_target(x0, t, noise, alphas, prediction_type, snr_limit)
    if target.stride() != x_t.stride():  # a noise that all samples share
        target = target.contiguous(memory_format=torch.channels_last)
    return x_t.to(x.dtype), target.to(x.dtype), weight


def _refuses(*arguments):
    """Why the kernels cannot serve a call, or None."""
    if torch.is_grad_enabled() and any(
        isinstance(y, torch.Tensor) and y.requires_grad for y in arguments
    ):
        return "the Triton kernel has no gradient: call it under torch.no_grad()"
    return None


_standardised_packet = Operator(
    "standardised_packet",
    reference.standardised_packet,
    cpu=_cpu_packet,
    triton=kernel("haar", "standardised_packet"),
    refuses={"triton": _refuses},
)
_noised_packet = Operator(
    "noised_packet",
    reference.noised_packet,
    cpu=_cpu_noised,
    triton=kernel("haar", "noised_packet"),
    refuses={"triton": _refuses},
)


def standardised_packet(x, mean, deviation, level=1):
    """``(haar_pack(x, level) - mean) / deviation``: coefficients of unit variance.

    x: (N,C,H,W), any strides, float32, bfloat16, float16 or float64; mean, deviation:
    (4^level C,), of any floating dtype. level: 0 to 4; at 0 the packet is ``x`` itself. Returns
    (N, 4^level C, H/2^level, W/2^level) in the dtype of ``x``, channels_last whatever ``x`` is.
    Computed in float32 at least. Differentiable, but not by Triton: `auto` takes another backend
    where a gradient is wanted.

    Raises TypeError for dtypes, ValueError for shapes, devices and levels. A deviation of 0 is not
    looked for.
    """
    _, level = _check(x, mean, deviation, level)
    return _standardised_packet(x, mean, deviation, level)


def noised_packet(
    x,
    mean,
    deviation,
    t,
    noise,
    alphas_cumprod,
    level=1,
    prediction_type="v_prediction",
    snr_limit=5.0,
):
    """:func:`noised_target` of :func:`standardised_packet`: a training step's input, its target and
    the weights of its errors, from the images.

    x, mean, deviation, level: as there. t, alphas_cumprod, prediction_type, snr_limit: as for
    :func:`noised_target`. noise: the shape of the packet, any strides, or 1 in place of N.

    Returns (x_t, target, weight): x_t and target in the packet's shape, the dtype of ``x`` and
    channels_last, weight (N,) float32. Differentiable as :func:`standardised_packet` is.

    Raises TypeError for dtypes, ValueError for shapes, devices and options. Values of ``t`` are
    not checked.
    """
    shape, level = _check(x, mean, deviation, level)
    check_noising(shape, x.device, t, noise, alphas_cumprod, "the packet")
    snr_limit = check_target(prediction_type, snr_limit)
    return _noised_packet(
        x, mean, deviation, t, noise, alphas_cumprod, level, prediction_type, snr_limit
    )


def _check(x, mean, deviation, level):
    """The packet's shape, and level as Python's integer."""
    checks.tensor("x", x, 4)
    level = checks.integer("level", level, 0, MAX_LEVEL)
    check_divides(x, level)
    n, c, h, w = x.shape
    shape = (n, c * 4**level, h >> level, w >> level)
    checks.shaped("mean", mean, shape[1:2], x.device)
    checks.shaped("deviation", deviation, shape[1:2], x.device)
    return shape, level


def channels_last(x):
    """The same images in channels_last strides.

    With one channel both formats have the same bytes, and PyTorch leaves the strides as they are.
    """
    n, c, h, w = x.shape
    if c == 1:
        return x.contiguous().view(n, h, w, 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


if native.loaded():

    @torch.library.register_fake("diffad_fast::standardised_packet")
    def _fake(x, mean, deviation, level):
        n, c, h, w = x.shape
        packet = x.new_empty(n, h >> level, w >> level, c * 4**level)
        return packet.permute(0, 3, 1, 2)
