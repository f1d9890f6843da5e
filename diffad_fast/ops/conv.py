"""The 3x3 convolution, with fewer multiplications where that pays."""

from __future__ import annotations

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .. import native, reference
from . import checks
from .dispatch import Operator, kernel
from .layout import is_channels_last

# kChannelBlock, kTile and kPoints of csrc/cpu/kernels/conv3x3.h
CHANNEL_BLOCK, TILE, POINTS = 16, 4, 36
# With fewer tiles, reading the packed weights, four times as large as the weights, takes as long as
# the multiplications that they save. Tiles of an image, not of a batch: the way, and with it a
# sample's last bits, must not depend on how many others there are.
FEWEST_TILES = 4

# Packed weights, by the weight, each with the version that it was packed from and a view of its
# memory, which so is no other's. They go when the weight does.
_packed = WeakTensorKeyDictionary()
# Fused optimizers write without a new version.
register_optimizer_step_post_hook(lambda *_: _packed.clear())


class _Conv3x3(torch.autograd.Function):
    """The native operator with its gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual):
        ctx.save_for_backward(x, weight)
        packed = torch.ops.diffad_fast.conv3x3_pack.default(weight, False)
        return torch.ops.diffad_fast.conv3x3.default(x, packed, bias, residual)

    @staticmethod
    def backward(ctx, grad):
        checks.differentiated_once("conv3x3")
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
    return torch.ops.diffad_fast.conv3x3.default(x, packed(weight), bias, residual)


def _served(x, given):
    """Does Winograd's algorithm take these? The reference, which is the vendor's convolution, takes
    what it is not written for, and shapes on which it is the faster one."""
    return (
        has_whole_blocks(given[1])
        and has_tiles(*x.shape[2:])
        and is_channels_last(x)
        and all(t.dtype == torch.float32 for t in given)
        and not _is_mixed(x)
    )


def _is_mixed(x):
    """Is autocast on, where there is one?"""
    device = x.device.type
    return device in reference.modes.DEVICES and torch.is_autocast_enabled(device)


def has_whole_blocks(weight):
    """Does Winograd's algorithm take these channels?"""
    outputs, inputs = weight.shape[:2]
    return (
        inputs > 0 and inputs % CHANNEL_BLOCK == 0 and outputs > 0 and outputs % CHANNEL_BLOCK == 0
    )


def has_tiles(height, width):
    """Does it take images of this size?"""
    tiles = -(-height // TILE) * -(-width // TILE)
    # A tile costs a fourth of 16 pixels by the direct sum, however few of them the image has.
    return tiles >= FEWEST_TILES and 2 * height * width >= TILE * TILE * tiles


def packed(weight):
    """``weight`` packed, once for each of its versions."""
    pack = torch.ops.diffad_fast.conv3x3_pack.default
    if (
        torch.compiler.is_compiling()
        or type(weight) not in (torch.Tensor, torch.nn.Parameter)
        or weight.is_inference()  # these have no version
    ):
        return pack(weight, False)
    version = weight._version, weight.data_ptr()
    known = _packed.get(weight)
    if known is None or known[0] != version:
        made = pack(weight, False)
        if type(made) is not torch.Tensor:  # in a mode of fake ones
            return made
        _packed[weight] = known = version, made, weight.detach()
    return known[1]


_kernel = kernel("conv3x3", "conv3x3")


def _triton(*arguments):
    if torch.compiler.is_compiling():  # it adds bias and residual in a kernel of its own making
        return reference.conv3x3(*arguments)
    return _kernel(*arguments)


_conv3x3 = Operator(
    "conv3x3",
    reference.conv3x3,
    triton=_triton,
    **dict.fromkeys(native.implementations("conv3x3"), _native),
)


def conv3x3(x, weight, bias=None, residual=None):
    """``conv2d(x, weight, bias, padding=1) + residual``: the 3x3 convolution of a U-Net.

    x: (N,I,H,W); weight: (O,I,3,3) and bias: (O,), of the dtype of ``x`` (any under autocast);
    residual: (N,O,H,W). Returns (N,O,H,W), in channels_last where ``x`` or, by PyTorch's
    convolution, ``weight`` is. Differentiable in all tensors.

    On the CPU, float32 in channels_last with I and O multiples of 16, unless the images are tiny,
    goes to Winograd's F(4x4,3x3), which takes a fourth of the multiplications (Lavin & Gray 2016).
    Its error is up to twice that of the direct sum: 1e-6 of the largest value for 128 channels. A
    NaN or infinity in x reaches the up to 6x6 outputs around it. Bits depend neither on the number
    of threads nor on the rest of the batch. Everything else goes to PyTorch's convolution; on a GPU
    bias and residual are then added together, in float32.

    Without gradients, what is made of ``weight`` is kept as long as that lives, in four times its
    memory, and made anew after a step of an optimizer of ``torch.optim`` and when its version or
    place in memory changes. Writing through ``weight.data`` and collectives of
    ``torch.distributed`` change neither: write under ``torch.no_grad()``, and call
    ``torch.autograd.graph.increment_version(weight)`` after a collective. With gradients the native
    one is differentiable once.

    Raises TypeError for dtypes, ValueError for shapes and devices.
    """
    checks.tensor("x", x, 4)
    checks.tensor("weight", weight, 4)
    n, inputs, height, width = x.shape
    outputs = weight.shape[0]
    expected = [("weight", weight, (outputs, inputs, 3, 3))]
    if bias is not None:
        expected.append(("bias", bias, (outputs,)))
    if residual is not None:
        expected.append(("residual", residual, (n, outputs, height, width)))
    mixed = _is_mixed(x)
    for name, y, shape in expected:
        checks.shaped(name, y, shape, x.device)
        if not mixed and y is not residual:
            checks.same_dtype(name, y, "x", x.dtype)
    return _conv3x3(x, weight, bias, residual)


def _fake(x, packed, bias, residual):
    n, _, height, width = x.shape
    return torch.empty(
        (n, packed.shape[0] * CHANNEL_BLOCK, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _fake_pack(weight, turned):
    outputs, inputs = weight.shape[:2]
    if turned:
        outputs, inputs = inputs, outputs
    return weight.new_empty((outputs // CHANNEL_BLOCK, POINTS, inputs, CHANNEL_BLOCK))


def _fake_weight_gradient(grad, x):
    return x.new_empty((grad.shape[1], x.shape[1], 3, 3))


if native.loaded():
    torch.library.register_fake("diffad_fast::conv3x3", _fake)
    torch.library.register_fake("diffad_fast::conv3x3_pack", _fake_pack)
    torch.library.register_fake("diffad_fast::conv3x3_weight_gradient", _fake_weight_gradient)
