"""The figures of a fitted detector on a labelled test set: images, clips or vectors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from . import metrics
from .data.audio_layouts import LabelledClip
from .data.image_files import read_mask
from .data.mvtec import TestImage, mvtec_test
from .errors import InputError
from .scoring import Score, own_part

if TYPE_CHECKING:
    from .detector import Detector


@dataclass(frozen=True)
class Evaluation:
    """Scores, ground truth and figures of a labelled test set, as the report draws them."""

    images: list[TestImage]
    score: Score
    label: np.ndarray
    """(N,) int64, 1 for an image with a defect."""
    metrics: dict


def evaluate(detector: Detector, root: Path, strict: bool) -> Evaluation:
    """Score every image below ``root``/test and compare with the masks; figures as documented at
    :meth:`diffad_fast.Detector.evaluate`."""
    tests = mvtec_test(root)
    images = detector.open([test.path for test in tests], strict=strict)
    tests = [tests[i] for i in images.load()]
    for test in tests:
        read_mask(test.mask_path, test.path)  # a wrong mask is told before the work
    score = detector.score(images)
    first = next(iter(detector.open([tests[0].path]).batches(1))).x
    result = {**figures(tests, score), "latency_ms": latency(detector, first)}
    return Evaluation(tests, score, labels(tests), result)


def evaluate_vectors(detector: Detector, source) -> dict:
    """Figures of a table with labels; as documented at :meth:`diffad_fast.Detector.evaluate`."""
    vectors = detector.open(source)
    if vectors.labels is None:
        raise InputError(
            "the table has no labels: give the pair (X, y), an .npz with X and y, or a .csv with a "
            "column label"
        )
    score, label = detector.score(vectors), vectors.labels
    figures = _scalar_figures(score, label)
    milliseconds = latency(detector, next(vectors.batches(1)).x)
    return {**figures.values, "latency_ms": milliseconds, "undefined": figures.undefined}


@dataclass(frozen=True)
class AudioEvaluation:
    """Scores, ground truth and figures of labelled clips, as the report draws them."""

    clips: list[LabelledClip]
    score: Score
    label: np.ndarray
    """(N,) int64, 1 for an anomaly."""
    metrics: dict


def evaluate_audio(
    detector: Detector, clips: Sequence[LabelledClip], strict: bool
) -> AudioEvaluation:
    """Score labelled clips; figures as documented at :meth:`diffad_fast.Detector.evaluate`."""
    opened = detector.open([clip.path for clip in clips], strict=strict)
    clips = [clips[i] for i in opened.load()]
    score = detector.score(opened)
    label = np.array([clip.anomaly for clip in clips], dtype=np.int64)
    figures = _scalar_figures(score, label)
    first = next(opened.batches(1)).x
    milliseconds = latency(detector, first)
    result = {
        **figures.values,
        "latency_ms": milliseconds,
        "real_time": first.shape[1] / detector.config.sample_rate / milliseconds * 1e3,
        "per_kind": _per_kind(clips, score, label),
        **_per_section(clips, score, label),
        "undefined": figures.undefined,
    }
    return AudioEvaluation(clips, score, label, result)


def _per_kind(clips: Sequence[LabelledClip], score: Score, label: np.ndarray) -> dict[str, dict]:
    """Figures of each kind of anomaly against all normals."""
    result = {}
    kinds = np.array([clip.kind for clip in clips])
    for kind in sorted(set(kinds[label == 1])):
        rows = (label == 0) | (kinds == kind)
        figures = _Figures(label[rows])
        figures.put(["auroc"], lambda rows=rows: (metrics.auroc(label[rows], score.score[rows]),))
        figures.put(["pauc"], lambda rows=rows: (metrics.pauc(label[rows], score.score[rows]),))
        result[str(kind)] = {**figures.values, "undefined": figures.undefined}
    return result


def _per_section(clips: Sequence[LabelledClip], score: Score, label: np.ndarray) -> dict:
    """DCASE Task 2 from 2022 on: in each section the AUROC of one domain's normals against the
    anomalies of both, the pAUC of both domains, and the harmonic mean of all these."""
    sections, found = {}, []
    section = np.array([clip.section for clip in clips])
    domain = np.array([clip.domain for clip in clips])
    for name in sorted(set(section) - {""}):
        own = section == name
        figures = _Figures(label[own])
        for part in sorted(set(domain[own])):
            rows = own & ((domain == part) | (label == 1))
            figures.put(
                [f"auroc_{part}"],
                lambda rows=rows: (metrics.auroc(label[rows], score.score[rows]),),
            )
        figures.put(["pauc"], lambda own=own: (metrics.pauc(label[own], score.score[own]),))
        sections[str(name)] = {**figures.values, "undefined": figures.undefined}
        found += [v for k, v in figures.values.items() if not k.startswith("n_")]
    if not sections:
        return {}
    complete = None not in found
    # An AUROC of 0 makes the harmonic mean 0.
    mean = statistics.harmonic_mean(found) if complete else None
    return {"sections": sections, "harmonic_mean": mean}


def _scalar_figures(score: Score, label: np.ndarray) -> _Figures:
    figures = _Figures(label)
    figures.put(["auroc"], lambda: (metrics.auroc(label, score.score),))
    figures.put(["pauc"], lambda: (metrics.pauc(label, score.score),))
    figures.put(["f1_max"], lambda: (metrics.f1_max(label, score.score),))
    figures.put_rates(score)
    return figures


def labels(tests: Sequence[TestImage]) -> np.ndarray:
    """(N,) int64, 1 for an image with a defect."""
    return np.array([test.defect != "good" for test in tests], dtype=np.int64)


def figures(tests: Sequence[TestImage], score: Score) -> dict:
    """The figures of these images, with ``per_defect`` and, for null ones, ``undefined``."""
    label = labels(tests)
    result, undefined = _figures(tests, score, label)
    result["per_defect"] = {}
    for defect in sorted({test.defect for test in tests} - {"good"}):
        rows = [i for i, test in enumerate(tests) if test.defect in ("good", defect)]
        part, why = _figures([tests[i] for i in rows], score.take(rows), label[rows])
        result["per_defect"][defect] = {**part, "undefined": why}
    result["undefined"] = undefined
    return result


class _Figures:
    """Figures of one set of samples, and why any of them is None."""

    def __init__(self, label: np.ndarray):
        self.label = label
        self.values: dict[str, float | int | None] = {
            "n_normal": int((label == 0).sum()),
            "n_anomalous": int(label.sum()),
        }
        self.undefined: dict[str, str] = {}

    def put(self, names: Sequence[str], compute: Callable[[], Sequence[float]]) -> None:
        """Take the figures that ``compute`` gives; None for each where it raises InputError."""
        try:
            self.values.update(zip(names, compute(), strict=True))
        except InputError as error:
            self.values.update(dict.fromkeys(names))
            self.undefined.update(dict.fromkeys(names, str(error)))

    def put_rates(self, score: Score) -> None:
        """Shares of the normal and of the anomalous samples that are labelled anomalous."""
        self.put(["false_positive_rate"], lambda: self._rate(score, 0))
        self.put(["true_positive_rate"], lambda: self._rate(score, 1))

    def _rate(self, score: Score, value: int) -> Sequence[float]:
        if score.label is None:
            raise InputError("too few normals were held out for labels")
        if not (self.label == value).any():
            raise InputError(f"there are no {'anomalous' if value else 'normal'} test samples")
        return (float(score.label[self.label == value].mean()),)


def _figures(tests: Sequence[TestImage], score: Score, label: np.ndarray) -> tuple[dict, dict]:
    """The figures of one set of test images, and why any of them is None."""
    figures = _Figures(label)

    def pixel() -> Sequence[float]:
        unmasked = sum(
            bool(defect) and t.mask_path is None for t, defect in zip(tests, label, strict=True)
        )
        if unmasked:
            raise InputError(f"{unmasked} defective images have no mask")
        values = metrics.pixel_metrics(_Masks(tests), _MapsAtMaskSize(score.map, tests))
        return values["auroc"], values["aupro"], values["f1_max"]

    figures.put(["image_auroc"], lambda: (metrics.auroc(label, score.score),))
    figures.put(["f1_max"], lambda: (metrics.f1_max(label, score.score),))
    figures.put(["pixel_auroc", "aupro", "pixel_f1_max"], pixel)
    figures.put_rates(score)
    return figures.values, figures.undefined


class _Masks:
    """The ground truth of test images at its own size, read from disk each time it is iterated."""

    def __init__(self, tests: Sequence[TestImage]):
        self.tests = tests

    def __iter__(self) -> Iterator[np.ndarray]:
        return (read_mask(test.mask_path, test.path) for test in self.tests)


class _MapsAtMaskSize:
    """Maps (N,H,W), each resized bilinearly to its mask's size, one at a time."""

    def __init__(self, maps: np.ndarray, tests: Sequence[TestImage]):
        self.maps, self.masks = maps, _Masks(tests)

    def __iter__(self) -> Iterator[np.ndarray]:
        for map_, mask in zip(self.maps, self.masks, strict=True):
            resized = nn.functional.interpolate(
                torch.from_numpy(own_part(map_))[None, None],
                mask.shape,
                mode="bilinear",
                align_corners=False,
            )
            yield resized[0, 0].numpy()


def latency(detector: Detector, x: torch.Tensor, runs: int = 15) -> float:
    """Median milliseconds from one decoded sample x (1,...) to its score and map on the host."""
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        detector.score_batch(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1e3
