"""The 3x3 convolution, with fewer multiplications where that pays."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .. import native, reference
from . import checks
from .dispatch import Operator
from .layout import is_channels_last

CHANNEL_BLOCK = 16  # kChannelBlock and kTile of csrc/cpu/kernels/conv3x3.h
TILE = 4
# Fewer tiles in a batch do not pay for reading packed weights, four times the size of the weights.
FEWEST_TILES = 4

# Packed weights by the weight, each with what it was packed from.
_packed = WeakTensorKeyDictionary()


class _Conv3x3(torch.autograd.Function):
    """The native operator with its gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual):
        ctx.save_for_backward(x, weight)
        packed = torch.ops.diffad_fast.conv3x3_pack.default(weight, False)
        return torch.ops.diffad_fast.conv3x3.default(x, packed, bias, residual)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "conv3x3 has no second derivative: leave out create_graph=True, or compute under "
                "use_backend('reference')"
            )
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, for_residual = ctx.needs_input_grad
        if not is_channels_last(grad):
            grad = grad.contiguous(memory_format=torch.channels_last)
        dx = dweight = dbias = None
        if for_x:
            turned = torch.ops.diffad_fast.conv3x3_pack.default(weight, True)
            dx = torch.ops.diffad_fast.conv3x3.default(grad, turned, None, None)
        if for_weight:
            dweight = torch.ops.diffad_fast.conv3x3_weight_gradient.default(grad, x)
        if for_bias:
            dbias = grad.sum((0, 2, 3))
        return dx, dweight, dbias, grad if for_residual else None


def _native(x, weight, bias, residual):
    given = [t for t in (x, weight, bias, residual) if t is not None]
    if not _served(x, given):
        return reference.conv3x3(x, weight, bias, residual)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return _Conv3x3.apply(x, weight, bias, residual)
    return torch.ops.diffad_fast.conv3x3.default(x, _pack(weight), bias, residual)


def _served(x, given):
    """Does our own convolution take these? The vendor's, which is the reference, takes the rest."""
    n, inputs, height, width = x.shape
    outputs = given[1].shape[0]
    return (
        inputs % CHANNEL_BLOCK == 0
        and outputs % CHANNEL_BLOCK == 0
        and all(t.dtype == torch.float32 for t in given)
        and is_channels_last(x)
        and n * -(-height // TILE) * -(-width // TILE) >= FEWEST_TILES
        and not torch.is_autocast_enabled(x.device.type)
    )


def _pack(weight):
    """``weight`` packed, once for each of its versions."""
    if torch.compiler.is_compiling() or weight.is_inference():
        return torch.ops.diffad_fast.conv3x3_pack.default(weight, False)
    version = weight._version, weight.data_ptr()
    known = _packed.get(weight)
    if known is None or known[0] != version:
        known = version, torch.ops.diffad_fast.conv3x3_pack.default(weight, False)
        _packed[weight] = known
    return known[1]


_conv3x3 = Operator(
    "conv3x3", reference.conv3x3, **dict.fromkeys(native.implementations("conv3x3"), _native)
)


def conv3x3(x, weight, bias=None, residual=None):
    """``conv2d(x, weight, bias, padding=1) + residual``: 3x3 filters, stride 1."""
    checks.tensor("x", x, 4)
    n, inputs, height, width = x.shape
    checks.tensor("weight", weight, 4)
    outputs = weight.shape[0]
    checks.shaped("weight", weight, (outputs, inputs, 3, 3), x.device)
    if bias is not None:
        checks.shaped("bias", bias, (outputs,), x.device)
    if residual is not None:
        checks.shaped("residual", residual, (n, outputs, height, width), x.device)
    return _conv3x3(x, weight, bias, residual)


def _fake(x, packed, bias, residual):
    blocks, _, _, block = packed.shape
    n, _, height, width = x.shape
    return x.new_empty((n, blocks * block, height, width)).contiguous(
        memory_format=torch.channels_last
    )


def _fake_pack(weight, turned):
    outputs, inputs = weight.shape[:2]
    if turned:
        outputs, inputs = inputs, outputs
    return weight.new_empty((outputs // CHANNEL_BLOCK, (TILE + 2) ** 2, inputs, CHANNEL_BLOCK))


def _fake_weight_gradient(grad, x):
    return x.new_empty((grad.shape[1], x.shape[1], 3, 3))


if native.loaded():
    torch.library.register_fake("diffad_fast::conv3x3", _fake)
    torch.library.register_fake("diffad_fast::conv3x3_pack", _fake_pack)
    torch.library.register_fake("diffad_fast::conv3x3_weight_gradient", _fake_weight_gradient)
