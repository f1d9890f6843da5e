"""Memory formats of native operators' outputs, as csrc/common/tensor.h has them."""

from __future__ import annotations

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Do the channels of ``x`` (N, C, H, W) lie next to each other, the columns around them?

    True for slices of a channels_last tensor too; for one channel the strides decide.
    """
    return x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def empty_4d(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A dense tensor of ``shape`` in ``like``'s dtype, device and memory format."""
    last = is_channels_last(like)
    return torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
