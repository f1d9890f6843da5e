from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..case import Case, Contender, finite, on, operator_case, random


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    n = 8 if device_type == "cpu" else 64
    table = [((n, 4, 32, 32, 32), 1), ((n // 4, 4, 64, 64, 32), 2), ((1, 2, 16, 16, 32), 1)]
    for shape, level in table[: 1 if quick else None]:
        batch, heads, height, width, d = shape
        numel = batch * heads * height * width * d
        tokens = height * width // 4**level
        yield operator_case(
            "wavelet_attention",
            f"level {level}, {'×'.join(map(str, shape))}",
            lambda device, shape=shape: on(device, *(random(*shape, seed=s) for s in range(3))),
            lambda functions, q, k, v, level=level: functions.wavelet_attention(
                q, k, v, level=level
            ),
            formats=False,
            peers={
                "SDPA over raw blocks": Contender(
                    lambda q, k, v, level=level: _over_blocks(q, k, v, level),
                    note="the same values while all gains are 1; no gains",
                ),
                "SDPA over pixels": Contender(
                    _over_pixels, check=finite, note=f"another function, {4**level}× the tokens"
                ),
            },
            bytes=4 * 4 * numel,
            flops=4 * batch * heads * tokens**2 * 4**level * d,  # q·k and a·v
            batch=batch,
        )


def _over_blocks(q, k, v, level):
    side = 2**level
    n, heads, h, w, d = q.shape

    def tokens(x):
        x = x.reshape(n, heads, h // side, side, w // side, side, d)
        return x.transpose(3, 4).reshape(n, heads, -1, side * side * d)

    y = F.scaled_dot_product_attention(tokens(q), tokens(k), tokens(v))
    y = y.reshape(n, heads, h // side, w // side, side, side, d)
    return y.transpose(3, 4).reshape(q.shape)


def _over_pixels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    y = F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3))
    return y.reshape(q.shape)
