"""Haar packets whose channels are standardised, and the same noised for training."""

from __future__ import annotations

import torch
from torch import Tensor

from .haar import haar_pack, in_memory_format
from .training import noised_target


def standardised_packet(x: Tensor, mean: Tensor, deviation: Tensor, level: int = 1) -> Tensor:
    """(haar_pack(x, level) - mean) / deviation, channels_last, in the dtype of ``x``.

    x: (N,C,H,W); mean, deviation: (4^level C,). At level 0 the packet is x itself. Computed in
    float32 at least.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = standardised(haar_pack(y, level) if level else y, mean, deviation)
    return in_memory_format(y.to(x.dtype), torch.channels_last)


def standardised(y: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(y - mean) / deviation by channels."""
    return (y - mean[:, None, None]) / deviation[:, None, None]


def noised_packet(
    x, mean, deviation, t, noise, alphas_cumprod, level=1, prediction_type="v_prediction",
    snr_limit=5.0,
):  # fmt: skip
    """``noised_target`` of ``standardised_packet``: x (N,C,H,W), noise of the packet's shape or
    with 1 in place of N -> x_t and target, channels_last, and weight (N,)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x0 = standardised_packet(wide, mean, deviation, level)
    x_t, target, weight = noised_target(x0, t, noise, alphas_cumprod, prediction_type, snr_limit)
    x_t, target = (in_memory_format(y.to(x.dtype), torch.channels_last) for y in (x_t, target))
    return x_t, target, weight
