from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import peers
from ..case import ONE_THREAD, Case, by_triton, numpy_inputs, on, operator_case, random


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    n = 16 if device_type == "cpu" else 128
    yield _three_maps(device_type, n)
    if quick:
        return
    yield _three_maps(device_type, 1)
    numel = n * 256 * 256
    yield operator_case(
        "anomaly_map",
        f"pixel map alone, {n}×3×256×256",
        lambda device: on(device, random(n, 3, 256, 256), random(n, 3, 256, 256, seed=1)),
        lambda functions, x, x_hat: functions.anomaly_map(x, x_hat, weights=(1.0, 0.0, 0.0)),
        peers=_by_scipy(),
        bytes=4 * 7 * numel,
        flops=(3 * 3 + 2 * 2 * 33) * numel,
        rate=None,
        batch=n,
    )


def _three_maps(device_type: str, n: int) -> Case:
    numel = n * 256 * 256
    features = [(48, 32), (64, 16), (64, 8)]  # channels and side: those of unet-tiny
    values = sum(c * side * side for c, side in features) * n
    stats = ((0.5, 0.1), (0.2, 0.1), (2.0, 0.5))

    def call(functions, x, x_hat, f, f_hat):
        return functions.anomaly_map(x, x_hat, f, f_hat, levels=3, stats=stats, sigma=4.0)

    return operator_case(
        "anomaly_map",
        f"three maps, {n}×1×256×256",
        lambda device: on(
            device,
            random(n, 1, 256, 256),
            random(n, 1, 256, 256, seed=1),
            [random(n, c, side, side, seed=2) for c, side in features],
            [random(n, c, side, side, seed=3) for c, side in features],
        ),
        call,
        peers=by_triton(device_type, call),
        bytes=4 * (3 * numel + 2 * values),
        # Cosines 6 a feature value; differences, sub-bands, sums 40 a pixel and the Gaussian's two
        # passes of 33 taps.
        flops=6 * values + (40 + 2 * 2 * 33) * numel,
        rate=None,
        tolerance=5e-5,
        batch=n,
    )


def _by_scipy():
    if not peers.get("scipy"):
        return {}

    def run(x, x_hat):
        import numpy as np
        from scipy.ndimage import gaussian_filter

        maps = np.stack([gaussian_filter(m, 4.0) for m in np.abs(x - x_hat).mean(axis=1)])
        flat = maps.reshape(len(maps), -1)
        count = max(1, round(0.01 * flat.shape[1]))
        score = np.partition(flat, -count, axis=1)[:, -count:].mean(axis=1)
        return torch.from_numpy(maps), torch.from_numpy(score)

    return {"SciPy": numpy_inputs(run, ONE_THREAD)}
