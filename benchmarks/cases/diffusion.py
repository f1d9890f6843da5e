from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from .. import peers
from ..case import REFERENCE, Case, Contender, on, operator_case, random

T, STEPS, FROM = 1000, 50, 500


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    n = 32 if device_type == "cpu" else 512
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float32), dim=0)
    for shape in ((n, 64, 32, 32), (1, 64, 32, 32))[: 1 if quick else None]:
        numel = math.prod(shape)
        times = torch.arange(shape[0]) * (T // shape[0])
        yield operator_case(
            "q_sample",
            "×".join(map(str, shape)),
            lambda device, shape=shape, times=times: on(
                device, random(*shape), times, random(*shape, seed=1), alphas
            ),
            lambda functions, x0, t, noise, table: functions.q_sample(x0, t, noise, table),
            peers=_add_noise(),
            bytes=12 * numel,
            flops=3 * numel,
            rate=None,
            batch=shape[0],
        )
        yield operator_case(
            "noised_target",
            f"v_prediction, {'×'.join(map(str, shape))}",
            lambda device, shape=shape, times=times: on(
                device, random(*shape), times, random(*shape, seed=1), alphas
            ),
            lambda functions, x0, t, noise, table: functions.noised_target(x0, t, noise, table),
            bytes=16 * numel,
            flops=6 * numel,
            rate=None,
            batch=shape[0],
        )
        yield _mse_case(shape)
        a, b = float(alphas[FROM]), float(alphas[FROM - T // STEPS])
        yield operator_case(
            "ddim_step",
            f"v_prediction, {'×'.join(map(str, shape))}",
            lambda device, shape=shape: on(device, random(*shape), random(*shape, seed=1)),
            lambda functions, x, m, a=a, b=b: functions.ddim_step(
                x, m, a, b, prediction_type="v_prediction"
            ),
            peers=_scheduler_step(),
            bytes=12 * numel,
            flops=9 * numel,
            rate=None,
            batch=shape[0],
        )
    yield _finish_case(16 if device_type == "cpu" else 512, 256, 3)


def _mse_case(shape: tuple[int, ...]) -> Case:
    numel = math.prod(shape)
    case = operator_case(
        "weighted_mse",
        "×".join(map(str, shape)),
        lambda device: on(device, random(*shape), random(*shape, seed=1), random(shape[0], seed=2)),
        lambda functions, x, y, weight: functions.weighted_mse(x, y, weight),
        bytes=8 * numel,
        flops=3 * numel,
        rate=None,
        batch=shape[0],
    )
    # Its loop adds up a sample's squares one after another in each place of a vector, where eager
    # PyTorch adds sums of few: with the eight places of AVX2 that rounds to 1.6e-5.
    name = f"{REFERENCE}, torch.compile"
    compiled = replace(case.contenders[name], tolerance=1e-4)
    return replace(case, contenders=case.contenders | {name: compiled})


def _finish_case(n: int, side: int, level: int) -> Case:
    """The end of a reconstruction: step, image and residual maps."""
    coarse, channels = side // 2**level, 4**level

    def inputs(device: torch.device) -> tuple:
        state = (n, channels, coarse, coarse)
        x, m = (
            random(*state, seed=s).contiguous(memory_format=torch.channels_last) for s in range(2)
        )
        images = random(n, 1, side, side, seed=2)
        return on(device, x, m, images, torch.zeros(channels), torch.ones(channels))

    return operator_case(
        "ddim_finish",
        f"v_prediction, {n}×1×{side}×{side}, level {level}",
        inputs,
        lambda functions, x, m, images, mean, deviation: functions.ddim_finish(
            x, m, 0.3, images, mean, deviation, level, prediction_type="v_prediction"
        ),
        memory_format="channels_last",
        # Reads the state, the network's output and the image; writes x0, x_hat and two maps.
        bytes=28 * n * side * side,
        flops=(12 + 4 * level) * n * side * side,
        rate=None,
        batch=n,
    )


def _scheduler():
    diffusers = peers.get("diffusers")
    scheduler = diffusers.DDIMScheduler(
        T, 1e-4, 0.02, "linear", clip_sample=False, prediction_type="v_prediction"
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def _add_noise() -> dict[str, Contender]:
    if not peers.get("diffusers"):
        return {}
    scheduler = _scheduler()
    return {"diffusers": Contender(lambda x0, t, noise, _: scheduler.add_noise(x0, noise, t))}


def _scheduler_step() -> dict[str, Contender]:
    if not peers.get("diffusers"):
        return {}
    scheduler = _scheduler()
    return {"diffusers": Contender(lambda x, m: scheduler.step(m, FROM, x).prev_sample)}
