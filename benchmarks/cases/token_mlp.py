from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from diffad_fast import native

from ..case import OURS, REFERENCE, Case, Contender, map_tensors, on, operator_case, random

# Tokens, token size, width, blocks, steps.
ON_CPU = (
    (4096, 64, 256, 4, 5),
    (4096, 64, 128, 4, 3),
    (256, 64, 256, 4, 5),
    (16, 64, 256, 4, 5),
    (1, 64, 256, 4, 5),
    (1, 64, 128, 4, 3),
)
ON_GPU = ((1 << 20, 64, 128, 4, 3), (65536, 64, 256, 4, 5), (1024, 64, 128, 4, 3))


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    # On a GPU the weights are what its matrix units are made for.
    gpu = device_type != "cpu"
    dtype, tolerance = (torch.bfloat16, 3e-2) if gpu else (torch.float32, 1e-4)
    for sizes in (ON_GPU if gpu else ON_CPU)[: 1 if quick else None]:
        yield _loop_case(sizes, dtype, tolerance)
    if not gpu and native.cpu_isa() in native.BF16_ISAS:
        for sizes in ON_CPU[: 1 if quick else None]:
            yield _loop_case(sizes, torch.bfloat16, 3e-2, wide_too=True)

    if not gpu and not quick:
        for tokens, *sizes in ON_CPU:
            if tokens == 1:
                yield _stream_case(*sizes)

    for tokens in (1024,) if quick else (1024, 8192):
        yield _loss_case(tokens, 64, 256, 3, 32, dtype, tolerance)


def _loop_case(sizes, dtype, tolerance, wide_too=False) -> Case:
    """All steps of the loop. wide_too: also by the reference with weights in float32."""
    from diffad_fast import reference
    from diffad_fast.ops.token_mlp import laid_out

    def wide(inputs):
        return map_tensors(lambda x: x.float(), inputs)

    def prepared(inputs):
        x, weights, bias, table = inputs
        return x, laid_out(weights), bias, table

    tokens, d, width, blocks, steps = sizes
    products = 2 * d * width + 2 * blocks * width**2
    parameters = products + 2 * width + blocks * width + d
    in_float32 = Contender(lambda *inputs: reference.token_mlp_loop(*inputs), wide, graph=True)
    case = operator_case(
        "token_mlp_loop",
        f"{tokens} tokens of {d}, width {width}, {blocks} blocks, {steps} steps{_weights(dtype)}",
        lambda device: on(device, *_inputs(*sizes, dtype)),
        lambda functions, *inputs: functions.token_mlp_loop(*inputs),
        dtype=_name(dtype),
        formats=False,
        peers={"reference, float32 weights": in_float32} if wide_too else {},
        bytes=4 * (2 * tokens * d + tokens * steps + steps * blocks * width)
        + dtype.itemsize * parameters,
        flops=2 * steps * tokens * products,
        tolerance=tolerance,  # rounding grows through steps * blocks layers
        batch=tokens,
        unit="token",
    )
    ours = replace(case.contenders[OURS], prepare=prepared)
    return replace(case, contenders=case.contenders | {OURS: ours})


def _stream_case(d, width, blocks, steps, rows=32) -> Case:
    """Single rows one after the other, a call each, as a program scores them: the weights are no
    inputs, of which the harness rotates copies, and stay in the caches. Without torch.compile,
    which would make one program of all calls."""
    from diffad_fast.ops.token_mlp import laid_out

    whole = _loop_case((rows, d, width, blocks, steps), torch.float32, 1e-4)
    x, weights, *rest = whole.inputs(torch.device("cpu"))

    def of_rows(contender: Contender, weights) -> Contender:
        def run(rows):
            found = [contender.run(row, weights, *rest) for row in rows]
            return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

        return replace(contender, run=run, prepare=lambda inputs: (inputs[0].split(1),))

    ours, reference = whole.contenders[OURS], whole.contenders[REFERENCE]
    return replace(
        whole,
        name=f"{rows} single tokens of {d} in a row, width {width}, {blocks} blocks, {steps} "
        "steps, weights stay in the caches",
        inputs=lambda device: on(device, x),
        exact=lambda inputs: whole.exact((*inputs, weights, *rest)),
        contenders={
            OURS: of_rows(ours, laid_out(weights)),
            REFERENCE: of_rows(reference, weights),
        },
        bytes=4 * rows * (2 * d + steps),
    )


def _loss_case(tokens, d, width, blocks, levels, dtype, tolerance) -> Case:
    """The training loss with the gradients of all weights."""

    def inputs(device: torch.device) -> tuple:
        x, weights, bias, _ = _inputs(tokens, d, width, blocks, levels, dtype)
        return on(device, x, random(tokens, d, seed=6), torch.ones(tokens), weights, bias)

    def call(functions, x, target, weight, weights, bias):
        leaves = [t.detach().requires_grad_() for t in (*weights, bias)]
        packed = type(weights)(*leaves[:-1])
        loss = functions.token_mlp_loss(x, target, weight, packed, leaves[-1])
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    products = 2 * d * width + 2 * blocks * width**2
    return operator_case(
        "token_mlp_loss",
        f"{tokens} tokens of {d}, width {width}, {blocks} blocks, {levels} levels, gradients"
        + _weights(dtype),
        inputs,
        call,
        dtype=_name(dtype),
        formats=False,
        compiled=False,
        bytes=4 * tokens * (2 * d + 1) + 2 * dtype.itemsize * products,
        # Forward, gradients of inputs (not of x) and of weights.
        flops=2 * tokens * (3 * products - d * width),
        tolerance=tolerance,
        batch=tokens,
        unit="token",
        gradients=True,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights(dtype: torch.dtype) -> str:
    """What a case's name says of its weights."""
    return "" if dtype == torch.float32 else f", {_name(dtype)} weights"


def _inputs(tokens, d, width, blocks, steps, dtype=torch.float32):
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
    packed = packed._replace(**{k: w.to(dtype) for k, w in packed._asdict().items()})
    # c_in, A, Bm, p, q of a slowly moving process: contracting, so that errors stay bounded.
    table = torch.tensor([0.8, 0.9, 0.2, 0.5, 0.5]).repeat(steps, 1)
    return random(tokens, d), packed, random(steps, blocks, width, seed=5), table
