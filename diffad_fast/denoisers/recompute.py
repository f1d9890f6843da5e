"""Training in less memory: what is cheap to compute again is not kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch


def recomputed(consumer: Callable, function: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """``consumer(function(*inputs))``, whose backward pass computes ``function`` once more.

    A convolution keeps its input for the gradient of its weights. Where that is the output of a
    normalisation, which keeps its own input, both lie in memory all the way between the passes,
    and the second takes a fraction of the convolution's time to make again from the first. The
    gradients are the same, bit for bit. torch.compile makes this choice by itself.
    """
    y = function(*inputs)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return consumer(y)
    place, size = y.data_ptr(), (y.numel(), y.dtype)
    inputs = tuple(t.detach() for t in inputs)
    device = y.device.type
    mixed = torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    )

    def pack(kept: torch.Tensor) -> torch.Tensor | tuple:
        """Of y itself, or a view of all of it, no more than how it is seen."""
        same = kept.data_ptr() == place and (kept.numel(), kept.dtype) == size
        return (kept.shape, kept.stride()) if same else kept

    def unpack(kept: torch.Tensor | tuple) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad(), mixed:
            return function(*inputs).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return consumer(y)
