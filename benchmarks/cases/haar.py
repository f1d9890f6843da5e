from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .. import peers
from ..case import (
    ONE_THREAD,
    Case,
    Contender,
    by_triton,
    numpy_inputs,
    on,
    operator_case,
    random,
)


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    n, many = (16, 64) if device_type == "cpu" else (256, 256)
    yield from _packet_cases(n)
    # (shape, level, memory format): images at the input, features inside the U-Net, one large
    # image, one small one where only the overhead of a call counts.
    table = [
        ((n, 3, 256, 256), 3, "contiguous"),
        ((many, 64, 64, 64), 1, "channels_last"),
        ((n, 3, 256, 256), 1, "contiguous"),
        ((n, 3, 256, 256), 2, "contiguous"),
        ((n, 3, 256, 256), 2, "channels_last"),
        ((many, 64, 64, 64), 3, "contiguous"),
        ((1, 3, 2048, 2048), 3, "contiguous"),
        ((1, 3, 2048, 2048), 1, "contiguous"),
        ((1, 1, 64, 64), 1, "contiguous"),
    ]
    for shape, level, memory_format in table[: 2 if quick else None]:
        batch, channels, height, width = shape
        numel = batch * channels * height * width
        name = f"level {level}, {'×'.join(map(str, shape))}, {memory_format}"
        # Along each axis one addition a sample and level, and one scaling at the end.
        costs = {"bytes": 8 * numel, "flops": (2 * level + 1) * numel, "rate": None}
        common = {"memory_format": memory_format, "batch": batch, **costs}
        fixed = _bank(level)
        packed = (batch, channels * 4**level, height >> level, width >> level)
        for operator, given, others in (
            ("haar_pack", shape,
             _peers(_pack_by_pywavelets, _pack_by_conv, _pack_by_product, level, fixed)),
            ("haar_unpack", packed,
             _peers(_unpack_by_pywavelets, _unpack_by_conv, _unpack_by_product, level, fixed)),
        ):  # fmt: skip

            def call(functions, x, operator=operator, level=level):
                return getattr(functions, operator)(x, level)

            yield operator_case(
                operator,
                name,
                lambda device, given=given: on(device, random(*given)),
                call,
                peers=others | by_triton(device_type, call, memory_format),
                **common,
            )


def _packet_cases(n: int) -> Iterator[Case]:
    """What a detector computes before its network does, on its images of 256²."""
    level, shape = 2, (n, 1, 256, 256)
    packed = (n, 4**level, 64, 64)
    numel = math.prod(shape)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32), dim=0)

    def inputs(device):
        statistics = random(packed[1], seed=1), 0.5 + random(packed[1], seed=2).abs()
        t = torch.arange(n) * (1000 // n)
        return on(device, random(*shape), *statistics, t, random(*packed, seed=3), alphas)

    def encode(functions, x, mean, deviation, *_):
        return functions.standardised_packet(x, mean, deviation, level)

    def noise(functions, *given):
        return functions.noised_packet(*given, level)

    def one_after_the_other(x, mean, deviation, t, z, table):
        from diffad_fast import ops

        x0 = ops.haar_pack(x.reshape(n, 256, 256, 1).permute(0, 3, 1, 2), level)
        x0 = (x0 - mean[:, None, None]) / deviation[:, None, None]
        z = z.contiguous(memory_format=torch.channels_last)
        return ops.noised_target(x0, t, z, table)

    # Additions of the packet; then 2 a value, and 6 more for x_t and v.
    for operator, call, traffic, flops, peers_ in (
        ("standardised_packet", encode, 8, 2 * level + 3, {}),
        ("noised_packet", noise, 16, 2 * level + 9,
         {"one operator after the other": Contender(one_after_the_other, graph=True)}),
    ):  # fmt: skip
        yield operator_case(
            operator,
            f"level {level}, {'×'.join(map(str, shape))}",
            inputs,
            call,
            peers=peers_,
            bytes=traffic * numel,
            flops=flops * numel,
            rate=None,
            batch=n,
        )


def _peers(by_pywavelets, by_conv, by_product, level: int, bank) -> dict[str, Contender]:
    result = {
        name: Contender(
            lambda x, filters, run=run: run(x, filters, level),
            lambda inputs: (inputs[0], bank.to(inputs[0].device)),
            graph=True,
        )
        for name, run in (
            ("conv2d with fixed filters", by_conv), ("matrix product and pixel_shuffle", by_product)
        )
    }  # fmt: skip
    if peers.get("pywt"):
        result["PyWavelets"] = numpy_inputs(lambda x: by_pywavelets(x, level), ONE_THREAD)
    return result


def _bank(level: int) -> torch.Tensor:
    """(4^level, 1, 2^level, 2^level): the packet's filters, from its response to unit pixels."""
    from diffad_fast import reference

    side = 2**level
    pixels = torch.eye(side * side).reshape(-1, 1, side, side)
    return reference.haar_pack(pixels, level).reshape(side * side, -1).T.reshape(-1, 1, side, side)


def _pack_by_conv(x, filters, level):
    n, c, h, w = x.shape
    y = F.conv2d(x.reshape(n * c, 1, h, w), filters, stride=2**level)
    return y.reshape(n, c, 4**level, *y.shape[2:]).transpose(1, 2).flatten(1, 2).contiguous()


def _unpack_by_conv(y, filters, level):
    n, c, h, w = y.shape
    bands = y.reshape(n, 4**level, -1, h, w).transpose(1, 2).reshape(-1, 4**level, h, w)
    x = F.conv_transpose2d(bands, filters, stride=2**level)
    return x.reshape(n, -1, *x.shape[2:])


def _pack_by_product(x, filters, level):
    n, c, h, w = x.shape
    pixels = F.pixel_unshuffle(x.reshape(n * c, 1, h, w), 2**level).flatten(2)
    bands = (filters.flatten(1) @ pixels).reshape(n, c, 4**level, h >> level, w >> level)
    return bands.transpose(1, 2).flatten(1, 2).contiguous()


def _unpack_by_product(y, filters, level):
    n, _, h, w = y.shape
    bands = y.reshape(n, 4**level, -1, h * w).transpose(1, 2)
    pixels = (filters.flatten(1).T @ bands).reshape(-1, 4**level, h, w)
    return F.pixel_shuffle(pixels, 2**level).reshape(n, -1, h << level, w << level)


def _pack_by_pywavelets(x, level):
    import numpy as np
    import pywt

    bands = [x]
    for _ in range(level):
        parts = [pywt.dwt2(band, "haar", mode="periodization") for band in bands]
        parts = [(low, *high) for low, high in parts]
        # The digit of the level just done, the coarsest so far, is the most significant.
        bands = [part[digit] for digit in range(4) for part in parts]
    return torch.from_numpy(np.concatenate(bands, axis=1))


def _unpack_by_pywavelets(y, level):
    import numpy as np
    import pywt

    bands = np.split(y, 4**level, axis=1)
    for _ in range(level):
        quarter = len(bands) // 4
        groups = [bands[i::quarter] for i in range(quarter)]
        bands = [pywt.idwt2((g[0], tuple(g[1:])), "haar", mode="periodization") for g in groups]
    return torch.from_numpy(bands[0])
