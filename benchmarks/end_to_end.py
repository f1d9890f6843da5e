"""Quality against latency: whole detectors on one data set, from decoded image to score and map."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from . import peers, stats
from .case import OURS, REFERENCE, Case, Contender
from .cases.detector import as_written, contiguous, in_float64
from .detectors import (
    DiffusersReconstruction,
    PatchNeighbours,
    PcaResidual,
    PublishedDiffusion,
    PyodPixels,
)
from .harness import Run
from .quality.data import part_of

# The first is the one that is timed against its own weights in plain PyTorch.
DENOISERS = ("unet-tiny", "unet-small", "token-mlp")
PUBLISHED_STEPS = (50, 250)


def run(runner: Run, args: argparse.Namespace) -> dict:
    """Fit, evaluate and time all detectors; the result to write."""
    from diffad_fast.data.images import mvtec_test, mvtec_train, open_images

    steps = args.train_steps or (20 if runner.quick else 500)
    root, text = _data(args, runner.quick)
    # What was chosen on a real data set was chosen on the other part of it.
    tests = [t for t in mvtec_test(root) if not args.data or part_of(t.path) == "report"]
    size = (args.size, args.size)
    images = {
        "train": _all(open_images(mvtec_train(root), size, 1, strict=True)),
        "test": _all(open_images([test.path for test in tests], size, 1, strict=True)),
    }
    scorers, notes = _ours(runner, args, steps, images["train"])
    references = dict(_references(scorers[OURS].detector))
    scorers |= references
    scorers |= _simple(images["train"])
    quality = {}
    for name, scorer in scorers.items():
        if name not in references:  # the same weights have the same quality
            print(f"  evaluating {name}", file=sys.stderr, flush=True)
            quality[name] = _quality(scorer, tests, images["test"])
    quality |= {name: quality[OURS] for name in references}

    exact = in_float64(scorers[OURS].detector)
    cases = [_case(n, scorers, notes, _repeated(images["test"], n), exact) for n in (1, 32)]
    runner.measure(cases)
    published = _published(runner, images["test"][: 2 if runner.quick else 8])
    ours = runner.rows[0]["contenders"][OURS]
    for name, entry in published.items():
        if "ms" in ours:
            ratio, low, high = stats.ratio(entry["ms"], ours["ms"], paired=False)
            verdict = stats.verdict(low, high)
            entry["ratio"] = {"value": ratio, "low": low, "high": high, "ours_is": verdict}
        runner.rows[0]["contenders"][name] = entry
    result = runner.result("end-to-end")
    result["quality"] = quality
    result["data"] = {
        "name": root.name, "size": args.size, "train_steps": steps,
        "text": f"{text} {len(images['train'])} normal training images, {len(tests)} test images, "
        f"{args.size}×{args.size}, grey. Our detectors trained {steps} steps, one seed"
        + (": far too few for the quality that they reach." if runner.quick else "."),
    }  # fmt: skip
    return result


def _data(args: argparse.Namespace, quick: bool) -> tuple[Path, str]:
    """A data set in the MVTec AD layout and a sentence about it."""
    if args.data:
        return args.data, f"Data set {args.data.name}, report part of the test images."
    from diffad_fast.data.demo import SIZES, write_data

    sizes = {**SIZES, "side": args.size}
    if quick:
        sizes |= {"train": 100, "test": 6}
    root = Path("out") / "benchmarks" / ("demo-quick" if quick else "demo")
    write_data(root, root.with_name(root.name + "-null"), texture="brick", seed=0, **sizes)
    return root, "The demo's brick texture with generated defects."


def _all(source) -> torch.Tensor:
    return torch.cat([batch.x for batch in source.batches(64)])


class _Ours:
    """A fitted detector in one of its modes; all modes share one model."""

    def __init__(self, detector, mode: str):
        # The mode belongs to the model, which the copies must not share.
        self.detector = copy.deepcopy(detector)
        self.detector.mode = mode

    def __call__(self, images: torch.Tensor):
        return self.detector.score_batch(images)


def _ours(runner: Run, args: argparse.Namespace, steps: int, train: torch.Tensor):
    """Each denoiser in each mode; the first is OURS."""
    from diffad_fast import Detector
    from diffad_fast.config import MODES

    scorers, notes = {}, {}
    for denoiser in DENOISERS:
        print(f"  fitting {denoiser}, {steps} steps", file=sys.stderr, flush=True)
        detector = Detector(
            image_size=args.size, channels=1, denoiser=denoiser, train_steps=steps,
            device=runner.device,
        ).fit(train)  # fmt: skip
        for mode in MODES:
            name = f"{OURS} {denoiser}, {mode}" if scorers else OURS
            scorers[name] = _Ours(detector, mode)
            count = sum(p.numel() for p in detector.model.parameters())
            notes[name] = (
                f"{denoiser}, mode {mode}, {detector.config.reverse_steps} steps, "
                f"{count / 1e6:.1f} M parameters"
            )
    return scorers, notes


def _references(detector):
    """The same weights on the reference operators, as a researcher would run them, and in
    channels_last."""

    def on_reference(variant):
        def score(images):
            with as_written():
                return variant.score_batch(images)

        return score

    yield REFERENCE, on_reference(contiguous(detector))
    yield f"{REFERENCE}, channels_last", on_reference(detector)


def _simple(train: torch.Tensor) -> dict[str, Callable]:
    """Peers without a network, those that are installed."""
    result: dict[str, Callable] = {}
    if peers.get("sklearn"):
        result["PCA residual"] = PcaResidual(train)
        result["patch kNN"] = PatchNeighbours(train)
    if peers.get("pyod"):
        for kind in ("ECOD", "KNN"):
            result[f"PyOD {kind}"] = PyodPixels(kind, train)
    return result


def _quality(scorer: Callable, tests, images: torch.Tensor) -> dict[str, float | None]:
    """Image AUROC and AUPRO by the evaluation that every user gets."""
    from diffad_fast.evaluation import figures
    from diffad_fast.scoring import Score

    maps, scores = [], []
    for part in images.split(32):
        *map_, score = scorer(part)
        scores.append(np.asarray(score, dtype=np.float64))
        maps.append(np.asarray(map_[0] if map_ else np.zeros_like(part[:, 0]), dtype=np.float32))
    score = np.concatenate(scores)
    empty = np.zeros(len(score))
    score = Score(score, np.concatenate(maps), empty, None, None, np.arange(len(score)))
    found = figures(tests, score)
    return {"image_auroc": found["image_auroc"], "aupro": found["aupro"] if map_ else None}


def _repeated(images: torch.Tensor, n: int) -> torch.Tensor:
    return images.repeat(-(-n // len(images)), 1, 1, 1)[:n]


def _case(n: int, scorers: dict, notes: dict, images: torch.Tensor, exact) -> Case:
    def exactly(inputs):
        with as_written():
            return exact.score_batch(inputs[0].double())

    contenders = {}
    for name, scorer in scorers.items():
        checked = name == OURS or name.startswith(REFERENCE)
        neural = checked or name.startswith(OURS)
        contenders[name] = Contender(
            scorer,
            memory_format="contiguous" if name == REFERENCE or not neural else "channels_last",
            dtype="float32" if neural else "",
            check=None if checked else _finite,
            note=notes.get(name, getattr(scorer, "note", "the weights of ours, eager")),
        )
    return Case(
        "end to end",
        f"batch {n}, {images.shape[2]}×{images.shape[3]}",
        lambda device: (images,),
        exactly,
        contenders,
        batch=n,
        unit="image",
        tolerance=5e-3,  # standardised maps: float32 errors divided by small deviations
        host=True,
    )


def _finite(output) -> str | None:
    return None if all(np.isfinite(part).all() for part in output) else "values that are not finite"


def _published(runner: Run, images: torch.Tensor) -> dict[str, dict]:
    """Latency of the pixel-space method as published code does it, image after image."""
    models = {"pixel U-Net": PublishedDiffusion(runner.device)}
    if peers.get("diffusers"):
        models["diffusers U-Net"] = DiffusersReconstruction(runner.device)
        if not runner.quick:
            models["diffusers U-Net, torch.compile"] = DiffusersReconstruction(runner.device, True)
    result = {}
    for name, model in models.items():
        for steps in PUBLISHED_STEPS[: 2 if name == "pixel U-Net" else 1]:
            print(f"  {name}, {steps} steps, {len(images)} images", file=sys.stderr, flush=True)
            result[f"{name}, {steps} steps"] = _one_by_one(runner, model, steps, images)
    return result


def _one_by_one(runner: Run, model, steps: int, images: torch.Tensor) -> dict:
    began = time.perf_counter()
    model(images[:1], 2)
    first = 1e3 * (time.perf_counter() - began)
    times = []
    for image in images:
        began = time.perf_counter()
        model(image[None], steps)
        times.append(1e3 * (time.perf_counter() - began))
    note = (
        f"{model.note}, {model.parameters / 1e6:.1f} M parameters, {steps} DDIM steps; random "
        f"weights, so no AUROC; {len(images)} images one after another, apart from the rounds"
    )
    return {
        "settings": Contender(model, compiled=model.compiled, note=note).settings(runner.device),
        "ms": [float(f"{value:.4g}") for value in times],
        **stats.quantiles(times),
        "per_second": 1e3 / float(np.median(times)),
        "first_call_ms": first,
    }
