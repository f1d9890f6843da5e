"""The built-in U-Net's evaluation as one operator: on a CPU, in float32, without gradients.

Of a single image Python, PyTorch's modules and its dispatcher take a fifth of the time of an
evaluation, on one core, while the others wait.
"""

from __future__ import annotations

from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import native, ops

SERVED = "cpu" in native.implementations("wavelet_unet")
TENSORS = {torch.Tensor, nn.Parameter}


class WholeUNet:
    """The weights and numbers of groups of a :class:`WaveletUNet` in the order of their use, as
    ``csrc/cpu/wavelet_unet.cpp`` takes them.

    Good until a weight is written, or a weight or a module replaced: :meth:`holds` tells, and looks
    at all of them, in one or two hundredths of the time of an evaluation.
    """

    def __init__(self, net: nn.Module):
        modules = list(net.modules())
        self._children = [(m._modules, name, c) for m in modules for name, c in m._modules.items()]
        self._parameters = [
            (m._parameters, name, p, _version(p))
            for m in modules
            for name, p in m._parameters.items()
        ]
        # A subclass, a parametrised, patched or other module does something else.
        self.fits = (
            _classes(net) == _as_built(net.widths, net.blocks)
            and not any("forward" in vars(m) for m in modules)
            and all(
                type(p) in TENSORS
                and p.is_cpu
                and p.dtype == torch.float32
                and not p.is_inference()
                for _, _, p, _ in self._parameters
            )
            and all(
                ops.conv.has_whole_blocks(m.weight) or m in (net.conv_in, net.conv_out)
                for m in net.layers()
                if _is_3x3(m)
            )
        )
        if self.fits:
            # Their memory, which so is no other's: an address tells whether it is still the same.
            self._memory = [p.detach() for _, _, p, _ in self._parameters]
            self.weights = [w for layer in net.layers() for w in _weights(layer)]
            self.groups = [m.groups for m in net.layers() if hasattr(m, "activation")]

    def holds(self) -> bool:
        return all(
            parameters.get(name) is p and _version(p) == version
            for parameters, name, p, version in self._parameters
        ) and all(children.get(name) is m for children, name, m in self._children)

    def is_hooked(self) -> bool:
        """Would calling one of the modules call something else too?"""
        return any(m._forward_hooks or m._forward_pre_hooks for _, _, m in self._children) or bool(
            module._global_forward_hooks or module._global_forward_pre_hooks
        )


_known: WeakKeyDictionary[nn.Module, WholeUNet] = WeakKeyDictionary()
# Fused optimizers write without a new version.
register_optimizer_step_post_hook(lambda *_: _known.clear())


def evaluation(
    net: nn.Module, x: torch.Tensor, conditioning: torch.Tensor, features: bool = False
) -> list[torch.Tensor] | None:
    """[output] of ``net.denoise(x, conditioning)``, or with ``features`` the encoder's maps; None
    where its modules have to be called one by one."""
    if not SERVED or torch.is_grad_enabled() or not ops.dispatch.takes_cpp(x):
        return None
    if any(type(t) not in TENSORS or t.dtype != torch.float32 for t in (x, conditioning)):
        return None
    coarsest = x.shape[2] // 4, x.shape[3] // 4
    if not (len(x) and ops.conv.is_channels_last(x) and ops.conv.has_tiles(*coarsest)):
        return None
    whole = _known.get(net)
    if whole is None or not whole.holds():
        _known[net] = whole = WholeUNet(net)
    if not whole.fits or whole.is_hooked():
        return None
    return torch.ops.diffad_fast.wavelet_unet.default(
        x, conditioning, whole.weights, whole.groups, net.widths, net.blocks, features
    )


@cache
def _as_built(widths: tuple[int, ...], blocks: int) -> dict[str, type]:
    """The classes of a U-Net's modules, whatever its channels."""
    from .wavelet_unet import WaveletUNet  # which imports this file

    with torch.device("meta"):
        return _classes(WaveletUNet(1, widths, blocks))


def _classes(net: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in net.named_modules()}


def _version(parameter: torch.Tensor) -> tuple[int, int]:
    if type(parameter) not in TENSORS or parameter.is_inference():
        return 0, 0  # not served, whatever it holds
    return parameter._version, parameter.data_ptr()


def _is_3x3(layer) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)


def _weights(layer) -> tuple[torch.Tensor, ...]:
    """Of one of ``net.layers()``: a module with weight and bias, or a tuple of parameters."""
    if isinstance(layer, tuple):
        return tuple(p.detach().contiguous() for p in layer)
    weight, bias = layer.weight.detach(), layer.bias.detach().contiguous()
    if _is_3x3(layer):
        if not ops.conv.has_whole_blocks(weight):
            return weight, bias
        return ops.conv.packed(layer.weight), bias
    if weight.ndim == 4:
        weight = weight.flatten(1)
    return weight.contiguous(), bias


def _fake(x, conditioning, weights, groups, widths, blocks, features):
    if not features:
        return [torch.empty_like(x)]
    n, _, h, w = x.shape
    return [
        ops.layout.empty_4d(x, (n, width, h >> level, w >> level))
        for level, width in enumerate(widths)
    ]


if SERVED:
    torch.library.register_fake("diffad_fast::wavelet_unet", _fake)
