"""Attention over the sub-bands of the Haar transform."""

from __future__ import annotations

import torch

from . import exported
from .haar import haar_pack, haar_unpack
from .modes import in_own_dtypes


@in_own_dtypes
def wavelet_attention(q, k, v, logit_gain=None, value_gain=None, level=1, scale=None):
    """(N,heads,H,W,d) -> the same shape.

    With X_b[i] the coefficients of sub-band b in block i (2^level x 2^level pixels), w and g the
    gains of a head and b over the 1 + 3 level bands of the pyramid, coarse to fine::

        S_ij = scale * sum_b w_b <Q_b[i], K_b[j]>
        A    = softmax_j(S)
        O_b[i] = g_b * sum_j A_ij V_b[j],    output = inverse Haar of O

    The softmax is computed in float32 at least, everything else in the dtype of ``q``.
    """
    heads, height, width, d = q.shape[1:]
    if scale is None:
        scale = (4**level * d) ** -0.5
    if level == 1 and torch.compiler.is_exporting():
        return exported.wavelet_attention(q, k, v, logit_gain, value_gain, scale)
    query, key, value = (_tokens(x, level) for x in (q, k, v))
    if logit_gain is not None:
        query = query * _per_coefficient(logit_gain.to(q.dtype), level, d)
    logits = (query * scale) @ key.mT
    mixing = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    out = mixing @ value
    if value_gain is not None:
        out = out * _per_coefficient(value_gain.to(q.dtype), level, d)
    return _pixels(out, level, height, width)


def _tokens(x, level):
    """(N,heads,H,W,d) -> (N,heads,T,4^level d): the pyramid's coefficients of each block.

    A token holds, for band after band from coarse to fine, first the d channels and within each
    the positions of that band in the block: one for the coarsest level, 4 for the next.
    """
    n, heads, _, _, d = x.shape
    low = x.permute(0, 1, 4, 2, 3).flatten(0, 1)
    details = []
    for finer in reversed(range(level)):
        low, detail = haar_pack(low).split([d, 3 * d], dim=1)
        details.append(_gathered(detail, 2**finer))
    y = torch.cat([low, *reversed(details)], dim=1)
    return y.flatten(2).mT.unflatten(0, (n, heads))


def _pixels(tokens, level, height, width):
    """Inverse of :func:`_tokens`."""
    n, heads, _, channels = tokens.shape
    d = channels // 4**level
    y = tokens.flatten(0, 1).mT.unflatten(2, (height >> level, width >> level))
    low, *details = y.split([d] + [3 * d * 4**finer for finer in range(level)], dim=1)
    for finer, detail in enumerate(details):
        low = haar_unpack(torch.cat([low, _spread(detail, 2**finer)], dim=1))
    return low.unflatten(0, (n, heads)).permute(0, 1, 3, 4, 2)


# PyTorch's pixel_unshuffle leaves tensors without elements in their shape, on the way back of
# pixel_shuffle, too.


def _gathered(x, side):
    """(M,C,h,w) -> (M,C side^2,h/side,w/side), as ``pixel_unshuffle``."""
    m, c, h, w = x.shape
    x = x.reshape(m, c, h // side, side, w // side, side).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(m, c * side**2, h // side, w // side)


def _spread(x, side):
    """Inverse of :func:`_gathered`."""
    m, c, h, w = x.shape
    x = x.reshape(m, c // side**2, side, side, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(m, c // side**2, h * side, w * side)


def _per_coefficient(gain, level, d):
    """(heads, 1 + 3 level) -> (heads,1,4^level d), in the order of :func:`_tokens`."""
    counts = [d] + [d * 4**finer for finer in range(level) for _ in range(3)]
    parts = [g.expand(-1, count) for g, count in zip(gain.split(1, dim=1), counts, strict=True)]
    return torch.cat(parts, dim=1).unsqueeze(1)
