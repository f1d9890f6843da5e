"""Haar packets: an image as 4**level times the channels at 1 / 2**level of the resolution."""

from __future__ import annotations

import torch

from .. import native, reference
from . import checks
from .dispatch import Operator, kernel
from .layout import empty_4d

MAX_LEVEL = 4


_haar_pack = Operator(
    "haar_pack",
    reference.haar_pack,
    triton=kernel("haar", "haar_pack"),
    **native.implementations("haar_pack"),
)
_haar_unpack = Operator(
    "haar_unpack",
    reference.haar_unpack,
    triton=kernel("haar", "haar_unpack"),
    **native.implementations("haar_unpack"),
)


def haar_pack(x, level=1):
    """Full orthonormal Haar packet of ``level`` levels, the bands moved into the channels.

    x: (N,C,H,W), any strides, float32, bfloat16, float16 or float64. Returns
    (N, 4^level C, H/2^level, W/2^level) in the dtype of ``x``, dense in its memory format
    (contiguous or channels_last). Output channel = band C + c; ``band`` written in base 4 has the
    coarsest level as its most significant digit, digits 0..3 = cA, cH, cV, cD as in PyWavelets.
    White noise stays white; norms are kept. Sums are taken in float32 (float64 for float64).
    ``level`` is 1 to 4. Differentiable, any number of times: the adjoint is
    :func:`haar_unpack`. Every backend but the reference reads and writes memory once whatever the
    level. On a GPU `auto` takes the CUDA kernel, and Triton's where that was not built.

    Raises TypeError for another type or dtype, ValueError for another number of dimensions, a
    ``level`` outside 1..4, and H or W that do not divide by 2^level.
    Source: Haar 1910; wavelet packets, Coifman & Wickerhauser 1992.
    """
    checks.tensor("x", x, 4)
    level = checks.integer("level", level, 1, MAX_LEVEL)
    check_divides(x, level)
    return _haar_pack(x, level)


def check_divides(x, level):
    """Height and width of ``x`` divide by 2^level."""
    height, width = x.shape[2], x.shape[3]
    if height % 2**level or width % 2**level:
        raise ValueError(
            f"x is {height} x {width}, which must divide by {2**level} for level {level}: pad or "
            f"crop it, or take a lower level"
        )


def haar_unpack(y, level=1):
    """Inverse of :func:`haar_pack`.

    y: (N,C,H,W) with C a multiple of 4^level, dtypes and strides as there. Returns
    (N, C/4^level, 2^level H, 2^level W).

    Raises TypeError for another type or dtype, ValueError for another number of dimensions, a
    ``level`` outside 1..4, and channels that do not divide by 4^level.
    """
    checks.tensor("y", y, 4)
    level = checks.integer("level", level, 1, MAX_LEVEL)
    if y.shape[1] % 4**level:
        raise ValueError(
            f"y has {y.shape[1]} channels, which must divide by {4**level} for level {level}"
        )
    return _haar_unpack(y, level)


def empty_packed(x, level):
    """What :func:`haar_pack` returns, not filled."""
    n, c, h, w = x.shape
    return empty_4d(x, (n, c * 4**level, h // 2**level, w // 2**level))


def empty_unpacked(y, level):
    """What :func:`haar_unpack` returns, not filled."""
    n, c, h, w = y.shape
    return empty_4d(y, (n, c // 4**level, h * 2**level, w * 2**level))


def keep_level(ctx, inputs, output):
    ctx.level = inputs[1]


# The transform is orthonormal: its adjoint is its inverse.
def _pack_backward(ctx, grad):
    return torch.ops.diffad_fast.haar_unpack(grad, ctx.level), None


def _unpack_backward(ctx, grad):
    return torch.ops.diffad_fast.haar_pack(grad, ctx.level), None


if native.loaded():
    for _name, _fake, _backward in (
        ("diffad_fast::haar_pack", empty_packed, _pack_backward),
        ("diffad_fast::haar_unpack", empty_unpacked, _unpack_backward),
    ):
        torch.library.register_fake(_name, _fake)
        torch.library.register_autograd(_name, _backward, setup_context=keep_level)
