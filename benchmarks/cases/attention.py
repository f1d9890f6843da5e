from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..case import Case, Contender, finite, on, operator_case, random


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    n = 8 if device_type == "cpu" else 64
    table = [
        ((n, 4, 32, 32, 32), 1),
        ((n // 4, 4, 64, 64, 32), 1),
        ((n // 4, 4, 64, 64, 32), 2),
        ((1, 2, 16, 16, 32), 1),
    ]
    for shape, level in table[: 1 if quick else None]:
        for gradients in (False,) if quick else (False, True):
            yield _case(shape, level, gradients)


def _case(shape: tuple[int, ...], level: int, gradients: bool) -> Case:
    batch, heads, height, width, d = shape
    numel = batch * heads * height * width * d
    tokens = height * width // 4**level

    def maybe_gradients(function):
        def forward_and_backward(*tensors):
            tensors = [t.detach().requires_grad_() for t in tensors]
            y = function(*tensors)
            # A gradient that is not constant: the output itself.
            return torch.autograd.grad(y, tensors, y.detach())

        return forward_and_backward if gradients else function

    return operator_case(
        "wavelet_attention",
        f"level {level}, {'×'.join(map(str, shape))}" + ", forward and backward" * gradients,
        lambda device: on(device, *(random(*shape, seed=s) for s in range(3))),
        lambda functions, *qkv: maybe_gradients(
            lambda q, k, v: functions.wavelet_attention(q, k, v, level=level)
        )(*qkv),
        formats=False,
        peers={
            "SDPA over raw blocks": Contender(
                maybe_gradients(lambda q, k, v: _over_blocks(q, k, v, level)),
                note="the same values while all gains are 1; no gains",
            ),
            "SDPA over pixels": Contender(
                maybe_gradients(_over_pixels),
                check=finite,
                note=f"another function, {4**level}× the tokens",
            ),
        },
        # Forward: q, k, v in, the output out. Backward: those and the gradient in, three out.
        bytes=4 * (12 if gradients else 4) * numel,
        # q·k and a·v; backward both logits and their gradient again, and three products.
        flops=(14 if gradients else 4) * batch * heads * tokens**2 * 4**level * d,
        batch=batch,
        gradients=gradients,
        compiled=not gradients,
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
