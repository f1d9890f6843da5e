"""Training in less memory: what is cheap to compute again is not kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..reference.modes import in_transform


def _check_unchanged(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    """As autograd does for what it saves without hooks."""
    for tensor, version in zip(tensors, versions, strict=True):
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that the gradient needs was changed in "
                f"place after the forward pass: it is at version {tensor._version}, and was at "
                f"{version}; call backward first"
            )


def recomputed(consumer: Callable, function: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """``consumer(function(*inputs))``, whose backward pass computes ``function`` once more.

    A convolution keeps its input for the gradient of its weights. Where that is the output of a
    normalisation, which keeps its own input, both lie in memory all the way between the passes,
    and the second takes a fraction of the convolution's time to make again from the first. The
    gradients are the same, bit for bit. torch.compile makes this choice by itself; in transforms of
    torch.func, whose tensors have no place in memory, everything is kept.
    """
    y = function(*inputs)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return consumer(y)
    place, size = y.data_ptr(), (y.numel(), y.dtype)
    inputs = tuple(t.detach() for t in inputs)
    device = y.device.type
    mixed = torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    )

    def pack(kept: torch.Tensor) -> tuple:
        """The tensor, or how y is seen that it is all of; what it will be made from, and the
        versions of that."""
        if kept.data_ptr() == place and (kept.numel(), kept.dtype) == size:
            return (kept.shape, kept.stride()), inputs, [t._version for t in inputs]
        return None, (kept,), [kept._version]

    def unpack(packed: tuple) -> torch.Tensor:
        seen, sources, versions = packed
        _check_unchanged(sources, versions)
        if seen is None:
            return sources[0]
        with torch.no_grad(), mixed:
            return function(*sources).as_strided(*seen)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return consumer(y)
