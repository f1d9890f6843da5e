from __future__ import annotations

from collections.abc import Iterator

import torch

from ..case import Case, on, operator_case, random


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    # Those of unet-small at 256², from the first convolution to the coarsest level, the widest
    # input of a decoder among them.
    n = 16 if device_type == "cpu" else 128
    table = [
        (1, 128, 128, 16),
        (n, 80, 80, 32),
        (1, 80, 80, 32),
        (n, 64, 80, 32),
        (n, 208, 80, 32),
        (n, 128, 128, 16),
        (n, 256, 128, 16),
        (n, 128, 128, 8),
        (1, 128, 128, 8),
    ]
    for shape in table[: 1 if quick else None]:
        for gradients in (False, True):
            yield _case(*shape, gradients)


def _case(batch: int, inputs: int, outputs: int, side: int, gradients: bool) -> Case:
    pixels = batch * side * side
    weights = 9 * inputs * outputs

    def tensors(device):
        weight = random(outputs, inputs, 3, 3, seed=1) / (9 * inputs) ** 0.5
        x, bias = random(batch, inputs, side, side), random(outputs, seed=2)
        return on(device, x, weight, bias, random(batch, outputs, side, side, seed=3))

    def forward(functions, x, weight, bias, residual):
        return functions.conv3x3(x, weight, bias, residual)

    def forward_and_backward(functions, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        y = forward(functions, *tensors)
        return torch.autograd.grad(y, tensors, y.detach())

    return operator_case(
        "conv3x3",
        f"{inputs} → {outputs} channels, {batch}×{side}×{side}, channels_last"
        + ", forward and backward" * gradients,
        tensors,
        forward_and_backward if gradients else forward,
        memory_format="channels_last",
        # Forward: x, residual and weights in, y out. Backward: the gradient and x in, dx out,
        # weights in and out; the gradient of the residual is that of y.
        bytes=4 * (pixels * (inputs + 2 * outputs) + weights)
        + gradients * 4 * (pixels * (2 * inputs + outputs) + 2 * weights),
        # Of the direct sum: 36 of 144 multiplications are left of it by Winograd's F(4x4, 3x3).
        flops=(3 if gradients else 1) * 2 * pixels * weights // 4,
        batch=batch,
        gradients=gradients,
        compiled=not gradients,
    )
