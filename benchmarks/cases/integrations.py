"""What a call through another library costs over the direct call, at batch 16.

``diffad_fast`` is the call through the host here; the ratio of "direct call" to it is 1 / (1 + the
adaptor's overhead). The exact result is the direct call's: what stands behind it has cases of its
own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

from .. import peers
from ..case import OURS, Case, Contender, numpy_inputs, on, random

BATCH, FEATURES, SIDE = 16, 32, 128
DIRECT = "direct call"


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    device = torch.device(device_type)
    for host, make in (
        ("sklearn", _sklearn), ("pyod", _pyod), ("diffusers", _diffusers), ("anomalib", _anomalib),
    ):  # fmt: skip
        if peers.get(host) is not None:  # if it is None, the result says why
            yield make(device)


def _sklearn(device: torch.device) -> Case:
    from diffad_fast.integrations.sklearn import DiffusionOutlierDetector

    estimator = DiffusionOutlierDetector(train_steps=2, device=str(device), random_state=0)
    return _rows("sklearn", estimator, lambda x: -estimator.score_samples(x))


def _pyod(device: torch.device) -> Case:
    from diffad_fast.integrations.pyod import DiffAD

    estimator = DiffAD(train_steps=2, device=str(device), random_state=0)
    return _rows("pyod", estimator, estimator.decision_function)


def _rows(host: str, estimator, through) -> Case:
    """Of an estimator for tables."""
    rows = random(BATCH, FEATURES, seed=1)
    estimator.fit(random(400, FEATURES).numpy())
    detector = estimator.detector_
    return _case(
        host,
        f"batch {BATCH}, {FEATURES} features",
        lambda device: (rows,),
        numpy_inputs(through),
        {
            DIRECT: numpy_inputs(lambda x: detector.score(x, maps=False).score),
            "innermost call": numpy_inputs(
                lambda x: detector.score_batch(torch.from_numpy(x))[1],
                note="Detector.score_batch: no checks, no p-values",
            ),
        },
    )


def _diffusers(device: torch.device) -> Case:
    from diffusers import DDIMScheduler

    from diffad_fast import ops
    from diffad_fast.integrations.diffusers import FusedDDIMScheduler

    shape, timestep = (BATCH, 3, 64, 64), 500
    ours, stock = FusedDDIMScheduler(), DDIMScheduler()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(50)
    alphas = ours.alphas_cumprod
    alpha_t, alpha_s = float(alphas[timestep]), float(alphas[timestep - 20])

    def direct(sample, output):
        x0 = ops.ddim_step(sample, output, alpha_t, 1.0, clip=1.0)
        return ops.ddim_step(sample, output, alpha_t, alpha_s, clip=1.0), x0

    def step(scheduler):
        return Contender(
            lambda sample, output: scheduler.step(output, timestep, sample, return_dict=False)
        )

    return _case(
        "diffusers",
        f"step, {BATCH}×3×64×64",
        lambda device: on(device, random(*shape), random(*shape, seed=1)),
        step(ours),
        {DIRECT: Contender(direct), "DDIMScheduler": step(stock)},
        host=False,
    )


def _anomalib(device: torch.device) -> Case:
    from diffad_fast.integrations.anomalib import DiffADFast

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = DiffADFast(
            "fast", SIDE, train_steps=2, pre_processor=False, post_processor=False,
            evaluator=False, visualizer=False,
        )  # fmt: skip
    images = (random(40, 3, SIDE, SIDE) / 8 + 0.5).clamp(0, 1)
    model.model.train()(images)
    model.model.fit(device)
    model.eval()
    detector = model.model.detector

    def through(x):
        answer = model(x)
        return answer.anomaly_map[:, 0], answer.pred_score

    def direct(x):
        answer = detector.score(x)
        return answer.map, answer.score

    innermost = Contender(detector.score_batch, note="Detector.score_batch: no checks, no p-values")
    return _case(
        "anomalib",
        f"batch {BATCH}, 3×{SIDE}×{SIDE}",
        lambda device: on(device, images[:BATCH]),
        Contender(through),
        {DIRECT: Contender(direct), "innermost call": innermost},
    )


def _case(library, name, inputs, through, others, host=True) -> Case:
    def exact(tensors):
        direct = others[DIRECT]
        return direct.run(*direct.prepare(tensors))

    contenders = {OURS: through, **others}
    return Case(library, name, inputs, exact, contenders, batch=BATCH, host=host)
