"""What a call through another library costs over the direct call, at batch 16.

``diffad_fast`` is the call through the host here; the ratio of its direct call to it is 1 / (1 +
the adaptor's overhead). The direct call of a detector is ``score``, which checks its input as the
hosts do and gives p-values and labels besides; ``score_batch`` does neither. The exact result is
the direct call's: what stands behind it has cases of its own. All contenders are our code.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial

import torch

from .. import peers
from ..case import OURS, Case, Contender, numpy_inputs, on, random

BATCH, FEATURES, SIDE, LOOP = 16, 32, 128, 4
ROUNDS = 2000
DIRECT, INNERMOST = f"{OURS}, direct call", f"{OURS}, innermost call"


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    device = torch.device(device_type)
    for host, make in (
        ("sklearn", _sklearn), ("pyod", _pyod), ("diffusers", _diffusers), ("anomalib", _anomalib),
    ):  # fmt: skip
        if peers.get(host) is not None:  # if it is None, the result says why
            yield from make(device)


def _sklearn(device: torch.device) -> Iterator[Case]:
    from diffad_fast.integrations.sklearn import DiffusionOutlierDetector

    estimator = DiffusionOutlierDetector(train_steps=2, device=str(device), random_state=0)
    yield _rows("sklearn", estimator, lambda x: -estimator.score_samples(x))


def _pyod(device: torch.device) -> Iterator[Case]:
    from diffad_fast.integrations.pyod import DiffAD

    estimator = DiffAD(train_steps=2, device=str(device), random_state=0)
    yield _rows("pyod", estimator, estimator.decision_function)


def _rows(host: str, estimator, through) -> Case:
    """Of an estimator for tables."""
    rows = random(BATCH, FEATURES, seed=1)
    estimator.fit(random(400, FEATURES).numpy())
    detector = estimator.detector_
    return _case(
        host,
        f"batch {BATCH}, {FEATURES} features",
        lambda device: (rows,),
        {
            OURS: numpy_inputs(through),
            DIRECT: numpy_inputs(lambda x: detector.score(x, maps=False).score),
            INNERMOST: numpy_inputs(
                lambda x: detector.score_batch(torch.from_numpy(x))[1],
                note="Detector.score_batch: no checks, no p-values",
            ),
        },
    )


def _diffusers(device: torch.device) -> Iterator[Case]:
    """A step alone, and a short loop around a small U-Net."""
    import diffusers

    from diffad_fast import ops
    from diffad_fast.integrations.diffusers import FusedDDIMScheduler, fast_sampler

    scheduler = FusedDDIMScheduler()
    scheduler.set_timesteps(LOOP)
    alphas, timesteps = scheduler.alphas_cumprod.tolist(), scheduler.timesteps.tolist()
    levels = [alphas[t] for t in timesteps] + [1.0]

    def through(i, sample, output):
        return scheduler.step(output, timesteps[i], sample, return_dict=False)

    def direct(i, sample, output):
        x0 = ops.ddim_step(sample, output, levels[i], 1.0, clip=1.0)
        return ops.ddim_step(sample, output, levels[i], levels[i + 1], clip=1.0), x0

    steps = {OURS: through, DIRECT: direct}
    shape = (BATCH, 3, 64, 64)
    yield _case(
        "diffusers",
        f"step, {BATCH}×3×64×64",
        lambda device: on(device, random(*shape), random(*shape, seed=1)),
        {name: Contender(partial(step, 1)) for name, step in steps.items()},
        host=False,
    )

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        32, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).to(device).eval()  # fmt: skip

    def loop(step):
        def run(x):
            for i, t in enumerate(timesteps):
                x = step(i, x, unet(x, t, return_dict=False)[0])[0]
            return x

        return Contender(run)

    contenders = {name: loop(step) for name, step in steps.items()}
    contenders[f"{OURS}, fast_sampler"] = Contender(fast_sampler(unet, scheduler, LOOP).run)
    yield _case(
        "diffusers",
        f"{LOOP} steps of a U-Net, {BATCH}×3×32×32",
        lambda device: on(device, random(BATCH, 3, 32, 32)),
        contenders,
        host=False,
        tolerance=1e-4,
    )


def _anomalib(device: torch.device) -> Iterator[Case]:
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
    yield _case(
        "anomalib",
        f"batch {BATCH}, 3×{SIDE}×{SIDE}",
        lambda device: on(device, images[:BATCH]),
        {OURS: Contender(through), DIRECT: Contender(direct), INNERMOST: innermost},
    )


def _case(library, name, inputs, contenders, host=True, tolerance=1e-5) -> Case:
    def exact(tensors):
        direct = contenders[DIRECT]
        return direct.run(*direct.prepare(tensors))

    return Case(
        library, name, inputs, exact, contenders, batch=BATCH, host=host, tolerance=tolerance,
        rounds=ROUNDS,
    )  # fmt: skip
