"""Counter-based normal noise (Philox 4x32, 10 rounds)."""

from __future__ import annotations

import math

import torch

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
# What the key grows by from round to round: the golden ratio and sqrt(3) - 1, times 2^32.
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Blocks of four numbers that are computed at a time; bounds the memory for intermediate values.
CHUNK = 1 << 22


def philox4x32(counter, key):
    """Four random 32-bit words from a counter of four words and a key of two.

    ``counter`` and ``key`` hold int64 tensors (of shapes that broadcast) or integers in
    [0, 2^32); so does the result. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers:
    as easy as 1, 2, 3", SC 2011, with the constants and the ten rounds of its Random123 library.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, so their bits are those of the unsigned product; the
        # mask removes the copies of the sign that the shift brings in.
        low = MULTIPLIERS[0] * c0
        high = MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((high >> 32) & WORD) ^ c1 ^ k0,
            high & WORD,
            ((low >> 32) & WORD) ^ c3 ^ k1,
            low & WORD,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def philox_normal(shape, seed, draw=0, step=0, device=None):
    """Standard normal numbers (float32) of ``shape``, a pure function of the other arguments.

    Element e of a field comes from the words w of block i = e // 4::

        w = philox4x32((i, draw mod 2^32, step mod 2^32, draw >> 32), (seed mod 2^32, seed >> 32))
        u1 = (w_a + 1) 2^-32,  u2 = w_b 2^-32,  r = sqrt(-2 ln u1)
        elements 4i, 4i+1 = r cos(2 pi u2), r sin(2 pi u2) of (a, b) = (0, 1)
        elements 4i+2, 4i+3 = the same of (a, b) = (2, 3)

    (Box & Muller 1958), computed in float64. With ``draw`` or ``step`` of shape (shape[0],),
    each leading index is a field of its own, of shape[1:]; else the whole tensor is one field.
    """
    shape = tuple(shape)
    tensors = [x for x in (draw, step) if isinstance(x, torch.Tensor)]
    if device is None:
        device = tensors[0].device if tensors else torch.get_default_device()
    draw, step = (x.to(device) if isinstance(x, torch.Tensor) else x for x in (draw, step))
    fields = shape[0] if tensors else 1
    elements = math.prod(shape) // fields if fields else 0
    blocks = -(-elements // 4)
    total = fields * blocks
    parts = []
    for start in range(0, total, CHUNK):
        index = torch.arange(start, min(start + CHUNK, total), device=device)
        field = index // blocks
        d = draw[field] if isinstance(draw, torch.Tensor) else draw
        s = step[field] if isinstance(step, torch.Tensor) else step
        words = philox4x32((index % blocks, d & WORD, s & WORD, d >> 32), (seed & WORD, seed >> 32))
        parts.append(torch.stack([*_box_muller(*words[:2]), *_box_muller(*words[2:])], dim=1))
    if not parts:
        return torch.empty(shape, dtype=torch.float32, device=device)
    return torch.cat(parts).view(fields, 4 * blocks)[:, :elements].reshape(shape)


def _box_muller(w1, w2):
    radius = ((w1 + 1).double() * 2.0**-32).log().mul(-2).sqrt()
    angle = w2.double() * (2 * math.pi * 2.0**-32)
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()
