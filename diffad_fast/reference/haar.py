"""Haar wavelet packets as channels: the definition of ``haar_pack`` and ``haar_unpack``.

One level maps each 2×2 block (a b / c d) to four coefficients, in the order of PyWavelets::

    cA = (a + b + c + d) / 2      cH = (a + b − c − d) / 2
    cV = (a − b + c − d) / 2      cD = (a − b − c + d) / 2

The four vectors are orthonormal, so the inverse is the transpose, and this matrix is symmetric: it
is its own inverse. A full packet of L levels splits every band again (Coifman & Wickerhauser 1992).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import exported
from .modes import in_transform


def _butterfly(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level on the four values of each block; its own inverse."""
    return (a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2


def haar_pack(x: Tensor, level: int = 1) -> Tensor:
    """Full Haar packet of ``level`` levels, the bands moved into the channels.

    ``x`` (N, C, H, W) of a floating dtype → (N, 4**level · C, H / 2**level, W / 2**level).
    Output channel = band · C + c; ``band`` in base 4 has the coarsest level as its most significant
    digit, digits 0..3 = cA, cH, cV, cD. Orthonormal: norms and white noise are preserved.
    Dense in the memory format of ``x``, contiguous or channels_last.
    Any ``level`` ≥ 1. Raises ValueError unless H and W divide by 2**level.
    """
    _check(x, level)
    memory_format = memory_format_of(x)
    if x.shape[-2] % 2**level or x.shape[-1] % 2**level:
        raise ValueError(
            f"haar_pack: height {x.shape[-2]} and width {x.shape[-1]} must divide by {2**level} "
            f"for level {level}: pad or crop the input, or take a lower level"
        )
    if torch.compiler.is_exporting():
        return exported.haar_pack(x, level)
    for _ in range(level):
        rows = x[..., 0::2, :], x[..., 1::2, :]
        block = [half[..., column::2] for half in rows for column in (0, 1)]
        # The level done last is the coarsest, and cat puts its digit in front.
        x = torch.cat(_butterfly(*block), dim=1)
    return in_memory_format(x, memory_format)


def haar_unpack(y: Tensor, level: int = 1) -> Tensor:
    """Inverse of :func:`haar_pack`.

    ``y`` (N, 4**level · C, H, W) of a floating dtype → (N, C, H · 2**level, W · 2**level).
    Any ``level`` ≥ 1. Raises ValueError unless the channels divide by 4**level.
    """
    _check(y, level)
    memory_format = memory_format_of(y)
    if y.shape[1] % 4**level:
        raise ValueError(
            f"haar_unpack: {y.shape[1]} channels must divide by {4**level} for level {level}"
        )
    if torch.compiler.is_exporting():
        return exported.haar_unpack(y, level)
    for _ in range(level):
        a, b, c, d = _butterfly(*y.chunk(4, dim=1))
        top, bottom = (torch.stack(pair, dim=-1).flatten(-2) for pair in ((a, b), (c, d)))
        y = torch.stack((top, bottom), dim=-2).flatten(-3, -2)
    return in_memory_format(y, memory_format)


def _check(x: Tensor, level: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"expected a tensor (N, C, H, W), got shape {tuple(x.shape)}")
    if level < 1:
        raise ValueError(f"level must be at least 1, got {level}")


def memory_format_of(x: Tensor) -> torch.memory_format:
    if x.stride(1) == 1 and x.stride(3) >= x.shape[1]:
        return torch.channels_last
    return torch.contiguous_format


def in_memory_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return x if in_transform() else x.contiguous(memory_format=memory_format)
