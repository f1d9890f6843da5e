from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import peers
from ..case import ONE_THREAD, Case, numpy_inputs, on, operator_case, random


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    for n in (16,) if quick else (16, 1):
        yield _case(n, 1, 256, levels=4)


def _case(n: int, channels: int, side: int, levels: int) -> Case:
    cell = side // 32
    numel = n * channels * side * side
    return operator_case(
        "band_energies",
        f"{n}×{channels}×{side}×{side}, cells of {cell}, {levels} levels",
        lambda device: on(device, random(n, channels, side, side)),
        lambda functions, x: functions.band_energies(x, cell, levels),
        formats=False,
        peers=_by_pywavelets(cell, levels),
        bytes=4 * (numel + (6 * levels + 1) * numel // cell**2),
        # Per pixel and level 10 sums and differences, and of each band a square, a sum, a maximum.
        flops=(19 * levels + 1) * numel,
        rate=None,
        batch=n,
    )


def _by_pywavelets(cell: int, levels: int):
    if not peers.get("pywt"):
        return {}

    def run(x):
        import numpy as np
        import pywt

        h, w = x.shape[2:]
        before = 2**levels
        pads = [(0, 0), (0, 0), *((before, -side % before + before) for side in (h, w))]
        found = pywt.swt2(
            np.pad(x, pads, mode="reflect"), "haar", levels, trim_approx=True, norm=True
        )
        squares, largest = [], []
        for level, bands in enumerate(reversed(found[1:])):
            start = before - 2**level
            for band in bands:
                square = np.square(band[..., start : start + h, start : start + w])
                grid = square.reshape(*x.shape[:2], h // cell, cell, w // cell, cell)
                squares.append(grid.mean(axis=(3, 5)))
                largest.append(grid.max(axis=(3, 5)))
        mean = x.reshape(*x.shape[:2], h // cell, cell, w // cell, cell).mean(axis=(3, 5))
        return torch.from_numpy(np.concatenate([*squares, *largest, mean], axis=1))

    return {"PyWavelets": numpy_inputs(run, ONE_THREAD)}
