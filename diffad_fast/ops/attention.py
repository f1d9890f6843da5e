"""Attention over the sub-bands of the Haar transform."""

from __future__ import annotations

import math

import torch

from .. import reference
from . import checks
from .dispatch import Operator


def _triton(*args):
    from ..kernels.wavelet_attention import wavelet_attention

    return wavelet_attention(*args)


def _triton_refuses(q, k, v, logit_gain, value_gain, level, scale):
    """What the Triton kernels were not made for: see kernels/wavelet_attention.py."""
    if q.dtype == torch.float64:
        return "it has no float64"
    if 4**level * q.shape[4] > 512:
        return f"head_dim {q.shape[4]} is more than {512 // 4**level}, its limit at level {level}"
    if q.shape[2] * q.shape[3] > 4**level << 20:
        return f"{q.shape[2]}x{q.shape[3]} pixels are more than 2^20 blocks"
    return None


_triton.refuses = _triton_refuses
_wavelet_attention = Operator("wavelet_attention", reference.wavelet_attention, triton=_triton)


def wavelet_attention(q, k, v, logit_gain=None, value_gain=None, level=1, scale=None):
    """Attention whose tokens are blocks of pixels and whose channels are Haar coefficients.

    q, k, v: (N,heads,H,W,d) of one dtype, H and W divisible by 2^level; level 1 or 2. Blocks of
    2^level x 2^level pixels are the tokens, (H/2^level)(W/2^level) in number. The gains
    (heads, 1 + 3 level) weight the sub-bands in the logits and in the values, coarse to fine: cA,
    cH, cV, cD, or cA2, cH2, cV2, cD2, cH1, cV1, cD1; None is all ones. ``scale`` multiplies the
    logits and defaults to 1/sqrt(4^level d). Returns (N,heads,H,W,d) in the dtype of ``q``.

    S_ij = scale * sum_b w_b <Q_b[i], K_b[j]>, A = softmax_j(S), O_b[i] = g_b sum_j A_ij V_b[j],
    output = inverse Haar of O. With all gains 1 this is attention between blocks of raw pixels,
    since the transform is orthonormal. Differentiable in the tensors.

    Raises TypeError for dtypes, ValueError for shapes, devices, level and scale.
    """
    checks.tensor("q", q, 5)
    for name, x in (("k", k), ("v", v)):
        checks.shaped(name, x, q.shape, q.device)
        checks.same_dtype(name, x, "q", q.dtype)
    checks.integer("level", level, 1, 2)
    heads, height, width = q.shape[1:4]
    block = 2**level
    if height % block or width % block:
        raise ValueError(
            f"H and W must be divisible by {block} for level {level}, got {height}x{width}: "
            f"pad or resize the input"
        )
    for name, gain in (("logit_gain", logit_gain), ("value_gain", value_gain)):
        if gain is not None:
            checks.shaped(name, gain, (heads, 1 + 3 * level), q.device)
    if scale is not None:
        checks.number("scale", scale, -math.inf)
    return _wavelet_attention(q, k, v, logit_gain, value_gain, level, scale)
