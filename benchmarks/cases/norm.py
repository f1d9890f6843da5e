from __future__ import annotations

from collections.abc import Iterator

from ..case import Case, on, operator_case, random


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    n = 32 if device_type == "cpu" else 256
    table = [
        ((n, 80, 32, 32), "channels_last"),
        ((n, 80, 32, 32), "contiguous"),
        ((n // 16, 64, 128, 128), "channels_last"),
        ((1, 128, 8, 8), "channels_last"),
    ]
    for shape, memory_format in table[: 1 if quick else None]:
        batch, channels, height, width = shape
        numel = batch * channels * height * width
        yield operator_case(
            "group_norm_silu",
            f"{channels // 16} groups, {'×'.join(map(str, shape))}, {memory_format}",
            lambda device, n=batch, c=channels, h=height, w=width: on(
                device,
                random(n, c, h, w) * 3 + 1,
                *(random(c, seed=s) for s in (1, 2)),
                *(random(n, c, seed=s) for s in (3, 4)),
            ),
            lambda functions, x, weight, bias, scale, shift: functions.group_norm_silu(
                x, x.shape[1] // 16, weight, bias, scale=scale, shift=shift
            ),
            memory_format=memory_format,
            bytes=8 * numel,
            # Mean and variance 4, normalisation and modulation 4, SiLU 4 a value.
            flops=12 * numel,
            rate=None,
            batch=batch,
        )
