"""What PyTorch's modes would do to the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

DEVICES = ("cpu", "cuda")


def in_own_dtypes(function: Callable) -> Callable:
    """``function`` outside autocast, which would round what goes into its products and convolutions
    and return other dtypes than those of its definition."""

    @functools.wraps(function)
    def outside(*args, **options):
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return outside(*args, **options)
        return function(*args, **options)

    return outside


def in_transform() -> bool:
    """Is this inside a transform of torch.func or forward-mode differentiation?

    Operators written for plain tensors would fail there, or lose tangents in silence; memory
    formats are left alone: in torch.vmap tensors have none.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
    )
