"""Fit detectors on data sets and compare them with their controls."""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from diffad_fast import Detector, metrics
from diffad_fast.config import MODES
from diffad_fast.denoisers.wavelet_unet import Stage
from diffad_fast.evaluation import image_metrics, latency
from diffad_fast.scoring import Score

from .. import arguments, stats
from ..case import OURS
from ..machine import describe
from ..results import write_quality
from . import anoddpm, dte
from .controls import NEAREST, controls, nearest, standardised
from .data import DataSet, find
from .tables import OTHERS, markdown, summary

# Options of variants that share a training: they change what is made of the model alone.
SCORING = (
    "mode", "map_weights", "smoothing", "top_fraction", "sigmas", "inversion_sigmas",
    "inversion_steps", "start_sigma", "reverse_steps", "eta", "clip", "guidance", "multi_scale",
)  # fmt: skip


def main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)

    sets = [
        found
        for path in args.data
        for found in find(path, args.size, args.channels, args.group_number, args.group_gap)
    ]
    if args.dte and not any(found.kind == "vector" for found in sets):
        parser.error("--dte: its detectors are for tables, and none of the data sets is one")
    if args.anoddpm and not any(found.kind == "image" for found in sets):
        parser.error("--anoddpm: it is for images, and none of the data sets has any")
    if min(args.anoddpm_steps, args.anoddpm_width) < 1:
        parser.error("--anoddpm-steps and --anoddpm-width are at least 1")
    if args.part != "all":
        sets = [found for found in sets if (found.part == args.part).any()]
    result = {
        "machine": describe(),
        "title": args.title or ", ".join(found.name for found in sets),
        "part": args.part,
        "preset": args.preset,
        "options": args.options,
        "variants": dict(args.variant),
        "seeds": args.seeds,
        "note": args.note,
        "sets": [_measure(found, args) for found in sets],
    }
    if args.anoddpm:
        result["anoddpm"] = {"steps": args.anoddpm_steps, "width": args.anoddpm_width}
    result["summary"] = summary(result)
    write_quality(args.name, result, markdown(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality",
        description="Accuracy of a preset over seeds, beside closed-form controls on its tokens. "
        "Choose on --part dev, report on --part report.",
    )
    parser.add_argument(
        "--data", required=True, nargs="+", type=arguments.folder, metavar="PATH",
        help="a category of MVTec AD, BTAD, MVTec LOCO AD, MVTec AD 2 or VisA, a folder of them "
        "(all of MVTec AD), or one of .npz tables; for UrbanSound8K see python -m benchmarks audio",
    )  # fmt: skip
    parser.add_argument("--part", choices=("report", "dev", "all"), default="report")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--options", type=json.loads, default={}, help="detector options, as JSON")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[], help="others to measure")
    parser.add_argument("--size", type=int, default=256, help="side of images (%(default)s)")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument(
        "--group-number", type=arguments.regex, metavar="REGEX",
        help="its first parenthesis is a number in file names, by which photographs of one object "
        "stand together",
    )  # fmt: skip
    parser.add_argument("--group-gap", type=int, default=0, help="a larger step: another object")
    parser.add_argument(
        "--variant", action="append", default=[], type=_variant, metavar="NAME=JSON",
        help="further options to measure beside the preset, for an ablation; of a U-Net also "
        '{"attention": false} and {"multi_scale": false}: the features of its coarsest level alone',
    )  # fmt: skip
    parser.add_argument(
        "--robustness", action="store_true",
        help="anomalies hidden in the training normals of the preset; shifts of the test images, "
        "for its variants too",
    )  # fmt: skip
    parser.add_argument("--without-controls", action="store_true")
    parser.add_argument(
        "--dte", type=arguments.folder, metavar="CLONE",
        help="a clone of https://github.com/vicliv/DTE, whose diffusion detectors are trained on "
        "tables beside ours, with their defaults",
    )  # fmt: skip
    parser.add_argument(
        "--anoddpm", type=arguments.folder, metavar="CLONE",
        help="a clone of https://github.com/Julian-Wyatt/AnoDDPM, a diffusion detector of images, "
        "which is trained beside ours",
    )  # fmt: skip
    parser.add_argument(
        "--anoddpm-steps", type=int, default=anoddpm.STEPS,
        help="its training, an image a step (published: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--anoddpm-width", type=int, default=anoddpm.WIDTH,
        help="channels of its U-Net at full resolution (published: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device")
    parser.add_argument("--name", default="quality", help="name of the result")
    parser.add_argument("--title", help="what the data sets are, in place of their names")
    parser.add_argument("--note", default="", help="what a reader must know, for the table")
    return parser


def _variant(text: str) -> tuple[str, dict]:
    name, _, options = text.partition("=")
    return name, json.loads(options)


class _Results:
    """What was measured on one data set: a list for each method, with an entry a seed."""

    def __init__(self, data: DataSet, part: str):
        every = np.arange(len(data.label))
        self.data, self.rows = data, every if part == "all" else every[data.part == part]
        # What is not of this part is not even scored.
        self.test = (
            data.test[self.rows] if data.tests is None
            else [data.tests[i].path for i in self.rows]
        )  # fmt: skip
        self.runs: dict[str, list[dict]] = {}
        self.scores: dict[str, list[np.ndarray]] = {}
        self.costs: dict[str, list[dict]] = {}
        self.robustness: dict[str, list[dict]] = {}

    def measure(self, method: str, detector: Detector, fit_seconds: float | None = None) -> None:
        score = detector.score(self.test, strict=True)
        sample = next(iter(detector.open(self.test).batches(1))).x
        cost = {"fit_seconds": fit_seconds, "latency_ms": latency(detector, sample)}
        self.keep(method, score, cost)

    def keep(self, method: str, score: Score, cost: dict) -> None:
        self.runs.setdefault(method, []).append(_figures(self.data, score, self.rows))
        self.scores.setdefault(method, []).append(score.score)
        self.costs.setdefault(method, []).append(cost)

    def concluded(self) -> dict:
        """The data set's entry in the result."""
        data, rows = self.data, self.rows
        groups = rows if data.test_groups is None else np.asarray(data.test_groups)[rows]
        label = data.label[rows]
        best = max(
            (name for name in OTHERS if name in self.scores), default=None,
            key=lambda name: _mean_auroc(label, self.scores[name]),
        )  # fmt: skip
        intervals, difference = _intervals(label, groups, self.scores, best)
        return {
            "name": data.name,
            "kind": data.kind,
            "n_normal": int((label == 0).sum()),
            "n_anomalous": int(label.sum()),
            "n_objects": len(set(groups.tolist())),
            "n_objects_in_both_parts": _in_both(data, rows),
            "stands_in": data.stands_in,
            "runs": self.runs,
            "intervals": intervals,
            "best_control": best,
            "difference_to_best_control": difference,
            "costs": self.costs,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "robustness": self.robustness,
        }


def _measure(data: DataSet, args: argparse.Namespace) -> dict:
    """Ours, and what stands beside it, on one data set: its entry in the result."""
    results = _Results(data, args.part)
    for seed in args.seeds:
        detector, seconds = _fit(data, args, seed, {})
        results.measure(OURS, detector, seconds)
        for mode in args.modes:
            detector.mode, usual = mode, detector.mode
            results.measure(f"{OURS}, {mode}", detector)
            detector.mode = usual
        _others(results, detector, args, seed)
        if args.robustness:
            found = _polluted(detector, data, args, seed, results.rows)
            found |= _shifted(detector, data, results.rows)
            results.robustness.setdefault(OURS, []).append(found)
        _variants(results, detector, seconds, args, seed)
        auroc = results.runs[OURS][-1]["image_auroc" if data.kind == "image" else "auroc"]
        print(f"{data.name} seed {seed}: AUROC {auroc:.3f}", file=sys.stderr, flush=True)
    return results.concluded()


def _others(results: _Results, detector: Detector, args: argparse.Namespace, seed: int) -> None:
    """The controls of ``detector``, and public detectors."""
    data, test = results.data, results.test
    if detector.config.on_tokens and not args.without_controls:
        for name, control in controls(detector, data.train):
            results.measure(name, control)
        if data.kind == "vector":
            distance = nearest(*standardised(data.train, test))
            results.keep(NEAREST, _score(distance), {"fit_seconds": None, "latency_ms": None})
    if args.dte and data.kind == "vector":
        for name, distance, cost in dte.detectors(args.dte, data.train, test, seed):
            results.keep(name, _score(distance), cost)
    if args.anoddpm and data.kind == "image":
        maps, distance, cost = anoddpm.detect(
            args.anoddpm, _array(detector, data.train), _array(detector, test), seed,
            args.anoddpm_steps, args.anoddpm_width,
        )  # fmt: skip
        results.keep(anoddpm.NAME, _score(distance, maps), cost)


def _variants(
    results: _Results, detector: Detector, seconds: float, args: argparse.Namespace, seed: int
) -> None:
    """The variants, each training only once; ``detector`` is what the preset alone trains."""
    data = results.data
    trained = {"{}": (detector, seconds)}
    for name, options in args.variant:
        scoring = {k: v for k, v in options.items() if _shares_training(k, v)}
        training = {k: v for k, v in options.items() if k not in scoring}
        key = json.dumps(training, sort_keys=True)
        if key not in trained:
            trained[key] = _fit(data, args, seed, training)
        other, seconds = trained[key]
        with _scored_by(other, data, scoring):
            results.measure(name, other, seconds)
            if args.robustness:
                found = _shifted(other, data, results.rows)
                results.robustness.setdefault(name, []).append(found)


def _shares_training(option: str, value: object) -> bool:
    """Without the semantic distance a detector trains the same, and fits what weighs nothing."""
    return option in SCORING or (option == "semantic_weight" and value == 0)


def _score(distance: np.ndarray, maps: np.ndarray | None = None) -> Score:
    """Of a method that gives nothing but that."""
    zero, order = np.zeros(len(distance)), np.arange(len(distance))
    return Score(distance.astype(np.float64), maps, zero, None, None, order)


def _in_both(data: DataSet, rows: np.ndarray) -> int:
    """Objects of ``rows`` of which other test images, of the other part, are left."""
    if data.test_groups is None:
        return 0
    groups = np.asarray(data.test_groups)
    return len(np.intersect1d(groups[rows], np.delete(groups, rows)))


def _fit(
    data: DataSet, args: argparse.Namespace, seed: int, options: dict, train=None, groups=None
) -> tuple[Detector, float]:
    options = {"preset": args.preset, **args.options, **options}
    attention = options.pop("attention", True)
    if data.kind == "image":
        options = {"image_size": args.size, "channels": args.channels, **options}
    detector = Detector(data.kind, seed=seed, device=args.device, **options)
    if not attention:
        for stage in detector.model.modules():
            if isinstance(stage, Stage):
                stage.attention = None
    began = time.perf_counter()
    if train is None:
        train, groups = data.train, data.groups
    detector.fit(train, groups=groups)
    return detector, time.perf_counter() - began


@contextmanager
def _scored_by(detector: Detector, data: DataSet, options: dict) -> Iterator[None]:
    """The detector with other options of scoring, calibrated for them, as long as this lasts."""
    if not options:
        yield
        return
    model, usual = detector.model, (detector.config, detector.calibrations)
    options = dict(options)
    if not options.pop("multi_scale", True):
        model._features = lambda x0: type(model)._features(model, x0)[-1:]
    model.config, detector.calibrations = detector.config.replace(**options), {}
    try:
        detector.calibrate(data.train, [detector.mode])
        yield
    finally:
        model.__dict__.pop("_features", None)
        model.config, detector.calibrations = usual
        model.use(detector.statistics)


def _figures(data: DataSet, score: Score, rows: np.ndarray) -> dict:
    """Of the scores of ``rows``."""
    if data.tests is not None:
        return image_metrics([data.tests[i] for i in rows], score)
    label = data.label[rows]
    return {
        "auroc": metrics.auroc(label, score.score), "f1_max": metrics.f1_max(label, score.score),
    }  # fmt: skip


# ------------------------------------------------------------- intervals


def _mean_auroc(label: np.ndarray, scores: Sequence[np.ndarray]) -> float:
    return float(np.mean([metrics.auroc(label, score) for score in scores]))


def _intervals(
    label: np.ndarray, groups: np.ndarray, scores: dict[str, list[np.ndarray]], best: str | None
) -> tuple[dict, list[float] | None]:
    """Of the mean AUROC over seeds, and of ours less the best control."""

    def measure(rows: np.ndarray) -> dict[str, float] | None:
        if label[rows].min() == label[rows].max():
            return None
        return {
            name: _mean_auroc(label[rows], [score[rows] for score in found])
            for name, found in scores.items()
        }

    observed, drawn = stats.over_groups(groups, measure)
    interval = {name: stats.interval(values) for name, values in drawn.items()}
    return interval, None if best is None else stats.difference(observed, drawn, OURS, best)


# ------------------------------------------------------------- robustness


def _polluted(
    detector: Detector, data: DataSet, args: argparse.Namespace, seed: int, rows: np.ndarray
) -> dict:
    """Change of the AUROC by anomalies that the training normals hide. It is that on the objects
    of which nothing is hidden; hidden images of one object are one group for ``fit``."""
    found = {}
    anomalous = np.flatnonzero(data.label == 1)
    drawn = np.random.default_rng(seed).permutation(anomalous)
    test = _array(detector, data.test)
    train = _array(detector, data.train)
    for share in (0.02, 0.05, 0.1):
        hidden = drawn[: max(1, round(share * len(train)))]
        # What was trained on is no test any more, nor is another photograph of it.
        kept, groups = np.setdiff1d(rows, hidden), data.groups
        if groups is not None:
            objects = np.asarray(data.test_groups)
            kept = kept[~np.isin(objects[kept], objects[hidden])]
            groups = [*groups, *(f"hidden {name}" for name in objects[hidden])]
        polluted = np.concatenate([train, test[hidden]])
        other, _ = _fit(data, args, seed, {}, polluted, groups)
        clean = metrics.auroc(data.label[kept], detector.score(test[kept], maps=False).score)
        auroc = metrics.auroc(data.label[kept], other.score(test[kept], maps=False).score)
        found[f"{share:.0%} hidden anomalies"] = auroc - clean
    return found


def _shifted(detector: Detector, data: DataSet, rows: np.ndarray) -> dict:
    """Change of the AUROC by shifts of the test images."""
    if data.kind != "image":
        return {}
    label, test = data.label[rows], _array(detector, data.test)[rows]

    def auroc(images: np.ndarray) -> float:
        return metrics.auroc(label, detector.score(images, maps=False).score)

    usual = auroc(test)
    return {
        name: auroc(np.clip(shift(test), 0, 1).astype(np.float32)) - usual
        for name, shift in SHIFTS.items()
    }


def _array(detector: Detector, source) -> np.ndarray:
    batches = detector.open(source).batches(64)
    return torch.cat([batch.x for batch in batches]).numpy()


def _blurred(images: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(images, (0, 0, 1, 1))


def _compressed(images: np.ndarray) -> np.ndarray:
    """JPEG of quality 50."""
    from PIL import Image

    result = np.empty_like(images)
    for image, out in zip(images, result, strict=True):
        for channel, plane in zip(image, out, strict=True):
            stream = io.BytesIO()
            Image.fromarray(np.rint(channel * 255).astype(np.uint8)).save(
                stream, "jpeg", quality=50
            )
            plane[:] = np.asarray(Image.open(stream), dtype=np.float32) / 255
    return result


SHIFTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exposure +0.1": lambda x: x + 0.1,
    "exposure -0.1": lambda x: x - 0.1,
    "gain 1.25": lambda x: x * 1.25,
    "gain 0.8": lambda x: x * 0.8,
    "blur, sigma 1 pixel": _blurred,
    "noise, deviation 0.02": lambda x: x + 0.02 * np.random.default_rng(0).standard_normal(x.shape),
    "JPEG, quality 50": _compressed,
}
