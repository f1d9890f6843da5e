"""Group normalisation with modulation and activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .exported import as_dtype
from .modes import in_own_dtypes, in_transform


@in_own_dtypes
def group_norm_silu(
    x, num_groups, weight=None, bias=None, eps=1e-5, scale=None, shift=None, activation=True
):
    """(N,C,H,W) -> the same shape: ``silu(GroupNorm(x) * (1 + scale) + shift)``.

    GroupNorm(x) = (x - mean) / sqrt(variance + eps) * weight + bias, with mean and (biased)
    variance over each group of C / num_groups channels of an image; weight and bias (C,), scale
    and shift (N,C). Source: Wu & He 2018; the modulation is that of Dhariwal & Nichol 2021.
    """
    weight, bias = (p if p is None else as_dtype(p, x.dtype) for p in (weight, bias))
    if weight is None and bias is not None:  # PyTorch has no gradient for that
        weight = torch.ones_like(bias)
    plain = in_transform()  # torch.group_norm fails there in channels_last
    # Not F.group_norm, which refuses groups of one value.
    y = torch.group_norm(x.contiguous() if plain else x, num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + as_dtype(scale, x.dtype)[..., None, None])
    if shift is not None:
        y = y + as_dtype(shift, x.dtype)[..., None, None]
    if activation:
        y = F.silu(y)
    if plain:
        return y
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        y = y.contiguous(memory_format=torch.channels_last)
    return y
