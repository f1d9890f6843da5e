from __future__ import annotations

from collections.abc import Iterator

import torch

from ..case import Case, on, operator_case, random


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    m = 4096 if device_type == "cpu" else 65536
    # Tokens, token size, width, blocks, steps.
    for tokens, d, width, blocks, steps in ((m, 64, 256, 4, 5), (256, 64, 256, 4, 5))[
        : 1 if quick else None
    ]:
        products = 2 * d * width + 2 * blocks * width**2
        parameters = products + 2 * width + blocks * width + d
        yield operator_case(
            "token_mlp_loop",
            f"{tokens} tokens of {d}, width {width}, {blocks} blocks, {steps} steps",
            lambda device, sizes=(tokens, d, width, blocks, steps): on(device, *_inputs(*sizes)),
            lambda functions, *inputs: functions.token_mlp_loop(*inputs),
            formats=False,
            bytes=4 * (2 * tokens * d + tokens * steps + parameters + steps * blocks * width),
            flops=2 * steps * tokens * products,
            tolerance=1e-4,  # rounding grows through steps * blocks layers
            batch=tokens,
            unit="token",
        )


def _inputs(tokens, d, width, blocks, steps):
    from diffad_fast import ops

    def weights(*shape, seed):
        return random(*shape, seed=seed) / shape[-1] ** 0.5

    packed = ops.PackedTokenMLP(
        W_in=weights(width, d, seed=1),
        b_in=torch.zeros(width),
        W1=weights(blocks, width, width, seed=2),
        W2=weights(blocks, width, width, seed=3),
        b2=torch.zeros(blocks, width),
        W_out=weights(d, width, seed=4),
        b_out=torch.zeros(d),
    )
    # c_in, A, Bm, p, q of a slowly moving process: contracting, so that errors stay bounded.
    table = torch.tensor([0.8, 0.9, 0.2, 0.5, 0.5]).repeat(steps, 1)
    return random(tokens, d), packed, random(steps, blocks, width, seed=5), table
