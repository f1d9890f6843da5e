"""The 3x3 convolution of a U-Net on a GPU: the vendor's, then bias and residual in one pass.

cuDNN's convolutions leave the bias to a kernel of its own, and the residual is another: each would
read and write the whole output once more. Here both are added in float32 and rounded once.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import is_channels_last
from .registration import cdiv, dense, launch, operator, source, widened


@triton.jit
def _add(y, bias, residual, result, total: tl.int64, pixels: tl.int64, CHANNELS: tl.constexpr,
         CHANNELS_LAST: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK values that lie side by side."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    # Only what lies within a block is counted in 32 bits.
    mask = i < tl.minimum(total - start, BLOCK).to(tl.int32)
    value = widened(tl.load(y + start + i, mask, 0.0))
    if BIAS:
        if CHANNELS_LAST:
            channel = ((start % CHANNELS).to(tl.int32) + i) % CHANNELS
            if CHANNELS % 8 == 0:  # then eight that start at a multiple of 8 never wrap around
                channel = tl.max_contiguous(tl.multiple_of(channel, 8), 8)
        else:
            channel = (start + i) // pixels % CHANNELS
        value += tl.load(bias + channel, mask, 0.0).to(value.dtype)
    if RESIDUAL:
        value += tl.load(residual + start + i, mask, 0.0).to(value.dtype)
    tl.store(result + start + i, value.to(result.dtype.element_ty), mask)


_CONFIGS = [triton.Config({"BLOCK": 1024}, num_warps=4)]


def _fake(y, bias, residual):
    dtype = y.dtype if residual is None else torch.promote_types(y.dtype, residual.dtype)
    return torch.empty_like(dense(y, y), dtype=dtype)


@operator(_fake)
def add_bias_and_residual(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """y (N,C,H,W) + bias (C,) + residual (N,C,H,W), in the wider dtype of y and residual."""
    result = _fake(y, bias, residual)
    if y.numel() == 0:
        return result
    y = dense(y, y)
    launch(
        _add, _CONFIGS, lambda meta: (cdiv(y.numel(), meta["BLOCK"]),),
        y, y if bias is None else bias.contiguous(), y if residual is None else dense(residual, y),
        result, y.numel(), y.shape[2] * y.shape[3], CHANNELS=y.shape[1],
        CHANNELS_LAST=is_channels_last(y), BIAS=bias is not None, RESIDUAL=residual is not None,
    )  # fmt: skip
    return result


def _setup(ctx, inputs, output):
    ctx.dtypes = [None if t is None else t.dtype for t in inputs]


def _backward(ctx, grad):
    y, bias, residual = ctx.dtypes
    needed = ctx.needs_input_grad
    return (
        grad.to(y) if needed[0] else None,
        grad.sum((0, 2, 3), dtype=bias) if needed[1] else None,
        grad.to(residual) if needed[2] else None,
    )


add_bias_and_residual.register_autograd(_backward, setup_context=_setup)


def conv3x3(x, weight, bias=None, residual=None):
    """See ``ops.conv3x3``."""
    y = F.conv2d(x, weight, padding=1)
    if bias is None and residual is None:
        return y
    return add_bias_and_residual(y, bias, residual)


def _variant(channels_last: bool, residual: bool, capability: int):
    """For bfloat16 activations of 80 channels."""
    types = dict.fromkeys(("y", "bias", "residual", "result"), "*bf16")
    types |= {"total": "i64", "pixels": "i64"}
    constants = {
        "CHANNELS": 80, "CHANNELS_LAST": channels_last, "BIAS": True, "RESIDUAL": residual,
    }  # fmt: skip
    return source(_add, _CONFIGS[0], types, **constants)


COMPILE = {
    f"add bias{' and residual' if residual else ''}, "
    f"{'channels_last' if last else 'contiguous'}": functools.partial(_variant, last, residual)
    for last in (True, False)
    for residual in (True, False)
}
