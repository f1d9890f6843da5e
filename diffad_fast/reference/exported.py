"""The operators of a U-Net in few nodes: what they are while a program is exported.

torch.export and the converters behind it trace a graph several times, at milliseconds a node. As
sums and differences, the Haar transforms would be two thirds of a U-Net's nodes; here they are
products with the transform's matrix. The values are those of the other modules, but for rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# One level on the values a, b, c, d of a block: rows cA, cH, cV, cD. Symmetric, its own inverse.
_HAAR = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2


def as_dtype(tensor, dtype):
    """``tensor`` in ``dtype``: an export notes a conversion also where nothing is converted."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _haar(x):
    """The matrix in the dtype and on the device of ``x``."""
    matrix = _HAAR if x.device == _HAAR.device else _HAAR.to(x.device)
    return as_dtype(matrix, x.dtype)


def haar_pack(x, level):
    for _ in range(level):
        c, height, width = x.shape[1:]
        # Channel 4 c + k holds the value k of each block.
        blocks = F.pixel_unshuffle(x, 2).reshape(-1, c, 4, height * width // 4)
        bands = (_haar(x) @ blocks).transpose(1, 2)
        x = bands.reshape(-1, 4 * c, height // 2, width // 2)
    return x


def haar_unpack(y, level):
    for _ in range(level):
        channels, height, width = y.shape[1:]
        bands = y.reshape(-1, 4, channels // 4, height * width).transpose(1, 2)
        blocks = _haar(y) @ bands
        y = F.pixel_shuffle(blocks.reshape(-1, channels, height, width), 2)
    return y


def wavelet_attention(q, k, v, logit_gain, value_gain, scale):
    """Of level 1.

    With H the symmetric, orthonormal matrix above, acting on the four pixels of a block, and w and
    g a head's gains, the logits are <H q, diag(w) H k> = <H diag(w) H q, k>, and since all bands
    are mixed alike the output is H diag(g) H (A v): two products of 4x4 matrices with raw pixels
    in the place of four transforms.
    """
    _, heads, height, width, d = q.shape
    rows, columns = height // 2, width // 2
    tokens = rows * columns

    def blocks(x, order):
        x = x.reshape(-1, heads, rows, 2, columns, 2, d)
        return x.permute(0, 1, *order)

    def by_token(x):
        return blocks(x, (2, 4, 3, 5, 6)).reshape(-1, heads, tokens, 4 * d)

    def weighted(x, gain):
        """H diag(gain) H on (N,heads,4,tokens d)."""
        if gain is None:
            return x
        haar = _haar(x)
        return (haar @ (as_dtype(gain, x.dtype).unsqueeze(-1) * haar)) @ x

    query = weighted(blocks(q, (3, 5, 2, 4, 6)).reshape(-1, heads, 4, tokens * d), logit_gain)
    query = query.reshape(-1, heads, 4, tokens, d).transpose(2, 3).reshape(-1, heads, tokens, 4 * d)
    logits = (query * scale) @ by_token(k).mT
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    mixing = logits.softmax(-1, dtype=torch.float32).to(q.dtype) if narrow else logits.softmax(-1)
    out = (mixing @ by_token(v)).reshape(-1, heads, tokens, 4, d).transpose(2, 3)
    out = weighted(out.reshape(-1, heads, 4, tokens * d), value_gain)
    out = out.reshape(-1, heads, 2, 2, rows, columns, d).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(-1, heads, height, width, d)
