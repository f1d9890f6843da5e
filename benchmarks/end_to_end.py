"""Quality against latency: whole detectors on one data set, from decoded image to score and map."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import cached_property, partial
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
from .verify import difference, finite

# Detectors that are fitted, and the modes in which each is scored, its own first.
DETECTORS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "balanced": ({}, ("one_step", "invert", "reconstruct")),
    "fast": ({"preset": "fast"}, ("one_step",)),
    "unet-small": ({"denoiser": "unet-small"}, ("reconstruct", "one_step")),
}
UNET_STEPS = 500
PUBLISHED_STEPS = (50, 250)
# Standardised maps: float32 errors divided by small deviations; bfloat16 where `fit` chose it.
TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-2}
CHECKED = 4  # images of a batch


def run(runner: Run, args: argparse.Namespace) -> dict:
    """Fit, evaluate and time all detectors; the result to write."""
    from diffad_fast.data.images import open_images
    from diffad_fast.data.mvtec import mvtec_train

    root, text = _data(args, runner.quick)
    tests = _tests(root, made_up=not args.data)
    size = (args.size, args.size)
    images = {
        "train": _all(open_images(mvtec_train(root), size, 1, strict=True)),
        "test": _all(open_images([test.path for test in tests], size, 1, strict=True)),
    }
    scorers = _ours(runner, args, images["train"])
    references = dict(_references(scorers))
    simple = _simple(images["train"])
    quality = {}
    for name, scorer in {**scorers, **simple}.items():
        print(f"  evaluating {name}", file=sys.stderr, flush=True)
        quality[name] = _quality(scorer, tests, images["test"])
    # The same weights have the same quality.
    quality |= {name: quality[one.of] for name, one in references.items()}

    scorers |= references | simple
    runner.measure([_case(n, scorers, _repeated(images["test"], n)) for n in (1, 32)])
    published = _published(runner, images["test"][: 2 if runner.quick else 8])
    ours = runner.rows[0]["contenders"][OURS]
    for name, entry in published.items():
        if "wrong" in entry:
            runner.wrong.append(f"{runner.rows[0]['case']}: {name}: {entry['wrong']}")
        elif "ms" in ours:
            ratio, low, high = stats.ratio(entry["ms"], ours["ms"], paired=False)
            verdict = stats.verdict(low, high)
            entry["ratio"] = {"value": ratio, "low": low, "high": high, "ours_is": verdict}
        runner.rows[0]["contenders"][name] = entry
    result = runner.result("end-to-end")
    result["quality"] = quality
    steps = _unet_steps(runner, args)
    result["data"] = {
        "name": root.name, "size": args.size, "unet_steps": steps,
        "text": f"{text} {len(images['train'])} normal training images, {len(tests)} test images, "
        f"{args.size}×{args.size}, grey. Our token detectors as their presets train them, the "
        f"U-Net {steps} steps, one seed"
        + (": far too few for the quality that they reach." if runner.quick else "."),
    }  # fmt: skip
    return result


def _unet_steps(runner: Run, args: argparse.Namespace) -> int:
    return args.train_steps or (20 if runner.quick else UNET_STEPS)


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


def _tests(root: Path, made_up: bool) -> list:
    """The test images; of a real data set those of the part that nothing was chosen on."""
    from diffad_fast.data.mvtec import mvtec_test

    return [t for t in mvtec_test(str(root)) if made_up or part_of(t.path) == "report"]


def _all(source) -> torch.Tensor:
    return torch.cat([batch.x for batch in source.batches(64)])


class _Ours:
    """A fitted detector in one of its modes, as its users have it."""

    memory_format = "channels_last"

    def __init__(self, detector, mode: str):
        # The mode belongs to the model, which the copies must not share.
        self.detector = copy.deepcopy(detector)
        self.detector.mode = mode
        config = self.detector.config
        self.dtype = config.inference_dtype
        count = sum(p.numel() for p in self.detector.model.parameters())
        steps = f", {config.reverse_steps} steps" if mode == "reconstruct" else ""
        self.note = f"{config.denoiser}, mode {mode}{steps}, {count / 1e6:.1f} M parameters"

    def __call__(self, images: torch.Tensor):
        return self.detector.score_batch(images)

    def exactly(self, images: torch.Tensor):
        with as_written():
            return in_float64(self.plain).score_batch(images.double())

    @cached_property
    def plain(self):
        """The same weights in float32, without the choice of a dtype that ``fit`` made."""
        if self.dtype == "float32":
            return self.detector
        plain = copy.deepcopy(self.detector)
        plain.model.config = plain.config.replace(inference_dtype="float32")
        plain.model.use(plain.model.statistics)
        return plain


class _Reference:
    """The weights of ``ours`` on the reference operators, eager and in float32, as a researcher
    would run them."""

    dtype = "float32"

    def __init__(self, of: str, ours: _Ours, memory_format: str):
        self.of, self.ours, self.memory_format = of, ours, memory_format
        self.note = f"the weights of {of}, plain PyTorch, eager"
        plain = ours.plain
        as_images = memory_format == "contiguous" and not plain.config.on_tokens
        self.variant = contiguous(plain) if as_images else plain
        self.exactly = ours.exactly

    def __call__(self, images: torch.Tensor):
        with as_written():
            return self.variant.score_batch(images)


def _ours(runner: Run, args: argparse.Namespace, train: torch.Tensor) -> dict[str, _Ours]:
    """Each detector in each of its modes; the first is OURS."""
    from diffad_fast import Detector

    scorers: dict[str, _Ours] = {}
    for name, (options, modes) in DETECTORS.items():
        print(f"  fitting {name}", file=sys.stderr, flush=True)
        if "denoiser" in options:
            options = {**options, "train_steps": _unet_steps(runner, args)}
        elif runner.quick:
            options = {**options, "train_steps": 20}
        detector = Detector(
            image_size=args.size, channels=1, device=runner.device, **options
        ).fit(train)  # fmt: skip
        for mode in modes:
            scorers[f"{OURS} {name}, {mode}" if scorers else OURS] = _Ours(detector, mode)
    return scorers


def _references(scorers: dict[str, _Ours]):
    """Of the default, and of what the paper describes: reconstruction by a U-Net."""
    yield REFERENCE, _Reference(OURS, scorers[OURS], "contiguous")
    unet = f"{OURS} unet-small, reconstruct"
    for memory_format in ("contiguous", "channels_last"):
        name = f"{REFERENCE} of unet-small, reconstruct, {memory_format}"
        yield name, _Reference(unet, scorers[unet], memory_format)


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
    from diffad_fast.evaluation import image_metrics
    from diffad_fast.scoring import Score

    maps, scores = [], []
    for part in images.split(32):
        *map_, score = scorer(part)
        scores.append(np.asarray(score, dtype=np.float64))
        maps.append(np.asarray(map_[0] if map_ else np.zeros_like(part[:, 0]), dtype=np.float32))
    score = np.concatenate(scores)
    empty = np.zeros(len(score))
    score = Score(score, np.concatenate(maps), empty, None, None, np.arange(len(score)))
    found = image_metrics(tests, score)
    return {"image_auroc": found["image_auroc"], "aupro": found["aupro"] if map_ else None}


def _repeated(images: torch.Tensor, n: int) -> torch.Tensor:
    return images.repeat(-(-n // len(images)), 1, 1, 1)[:n]


def _case(n: int, scorers: dict, images: torch.Tensor) -> Case:
    contenders = {}
    for name, scorer in scorers.items():
        contenders[name] = Contender(
            scorer,
            memory_format=getattr(scorer, "memory_format", "contiguous"),
            dtype=getattr(scorer, "dtype", ""),
            check=_check(scorer, images),
            note=scorer.note,
        )
    return Case(
        "end to end",
        f"batch {n}, {images.shape[2]}×{images.shape[3]}",
        lambda device: (images,),
        lambda inputs: None,  # every contender is another detector and has its own check
        contenders,
        batch=n,
        unit="image",
        host=True,
    )


def _check(scorer, images: torch.Tensor) -> Callable:
    """Ours are held against the same weights in float64 on the first images, which is enough as a
    score does not depend on its neighbours; others must give a finite score an image."""
    if not isinstance(scorer, (_Ours, _Reference)):
        return partial(_scored, len(images))
    some = images[:CHECKED]

    def check(output) -> str | None:
        found = [part[: len(some)] for part in output]
        return difference(scorer.exactly(some), found, TOLERANCE[scorer.dtype])

    return check


def _scored(n: int, output) -> str | None:
    """What is wrong with the maps and scores of ``n`` images."""
    scores = len(output[-1])
    return finite(output) if scores == n else f"{scores} scores instead of {n}"


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
    note = (
        f"{model.note}, {model.parameters / 1e6:.1f} M parameters, {steps} DDIM steps; random "
        f"weights, so no AUROC; {len(images)} images one after another, apart from the rounds"
    )
    gpu = model.compiled and runner.device.type == "cuda"
    settings = Contender(model, compiled=model.compiled, graph=gpu, note=note).settings(
        runner.device
    )
    began = time.perf_counter()
    model(images[:1], 2)
    first = 1e3 * (time.perf_counter() - began)
    times = []
    for image in images:
        began = time.perf_counter()
        output = model(image[None], steps)
        times.append(1e3 * (time.perf_counter() - began))
        if reason := _scored(1, output):
            return {"settings": settings, "wrong": reason}
    return {
        "settings": settings,
        "ms": [float(f"{value:.4g}") for value in times],
        **stats.quantiles(times),
        "per_second": 1e3 / float(np.median(times)),
        "first_call_ms": first,
    }
