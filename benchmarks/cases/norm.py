from __future__ import annotations

from collections.abc import Iterator

import torch

from ..case import Case, on, operator_case, random


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    # Plain ones, then those of a residual block: modulated, in the shapes of unet-small at 256².
    n = 16 if device_type == "cpu" else 128
    table = [
        ((n // 2, 64, 64, 64), False, "channels_last"),
        ((n // 2, 256, 16, 16), False, "channels_last"),
        ((n, 80, 32, 32), True, "channels_last"),
        ((n, 80, 32, 32), True, "contiguous"),
        ((n, 208, 32, 32), True, "channels_last"),
        ((n, 256, 8, 8), True, "channels_last"),
        ((1, 80, 32, 32), True, "channels_last"),
        ((1, 128, 8, 8), True, "channels_last"),
    ]
    for shape, modulated, memory_format in table[: 2 if quick else None]:
        for gradients in (False, True):
            yield _case(shape, modulated, memory_format, gradients)
        if device_type == "cuda" and shape[0] == 1:
            yield _case(shape, modulated, memory_format, gradients=False, graph=False)


def _case(shape, modulated: bool, memory_format: str, gradients: bool, graph: bool = True) -> Case:
    batch, channels, height, width = shape
    numel = batch * channels * height * width
    name = f"{channels // 16} groups, {'×'.join(map(str, shape))}, {memory_format}"

    def inputs(device):
        parameters = [random(channels, seed=s) for s in (1, 2)]
        if modulated:
            parameters += [random(batch, channels, seed=s) for s in (3, 4)]
        return on(device, random(*shape) * 3 + 1, *parameters)

    def forward(functions, x, weight, bias, scale=None, shift=None):
        return functions.group_norm_silu(x, channels // 16, weight, bias, scale=scale, shift=shift)

    def forward_and_backward(functions, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        y = forward(functions, *tensors)
        # A gradient that is neither constant nor another tensor's traffic: the output itself.
        return torch.autograd.grad(y, tensors, y.detach())

    return operator_case(
        "group_norm_silu",
        name
        + ", modulated" * modulated
        + ", forward and backward" * gradients
        + ", launched one by one" * (not graph),
        inputs,
        forward_and_backward if gradients else forward,
        memory_format=memory_format,
        # Forward: x in, y out. Backward: x and the gradient in, dx out.
        bytes=(20 if gradients else 8) * numel,
        # Forward: mean and variance 4, normalisation and modulation 4, SiLU 4 a value. Backward:
        # the last 8 again, derivative of SiLU 5, two sums 4, dx 4.
        flops=(33 if gradients else 12) * numel,
        rate=None,
        batch=batch,
        gradients=gradients,
        compiled=not gradients,
        graph=graph,
        host=not graph,  # the time of a launch is the host's
    )
