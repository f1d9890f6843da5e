"""The figures of a fitted detector on a labelled test set: images, clips or vectors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from . import metrics
from .data.audio_layouts import LabelledClip
from .data.image_files import read_mask
from .data.mvtec import TestImage
from .errors import InputError
from .scoring import Score, own_part

if TYPE_CHECKING:
    from .detector import Detector


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """Scores, ground truth and figures of a labelled test set, as the report draws them."""

    score: Score
    label: np.ndarray
    """(N,) int64, 1 for an anomaly."""
    metrics: dict


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Evaluation):
    """Of images; anomalies are those with a defect."""

    images: list[TestImage]


@dataclass(frozen=True, kw_only=True)
class AudioEvaluation(_Evaluation):
    """Of clips."""

    clips: list[LabelledClip]


def evaluate(detector: Detector, tests: Sequence[TestImage], strict: bool) -> Evaluation:
    """Score images and compare with their masks; figures as documented at
    :meth:`diffad_fast.Detector.evaluate`."""
    images = detector.open([test.path for test in tests], strict=strict)
    tests = [tests[i] for i in images.load()]
    for test in tests:
        read_mask(test.mask_path, test.path)  # a wrong mask is told before the work
    score = detector.score(images)
    first = next(iter(detector.open([tests[0].path]).batches(1))).x
    found = {
        **image_metrics(tests, score),
        "threshold": detector.threshold,
        "latency_ms": latency(detector, first),
    }
    return Evaluation(images=tests, score=score, label=image_labels(tests), metrics=found)


def evaluate_vectors(detector: Detector, source) -> dict:
    """Figures of a table with labels; as documented at :meth:`diffad_fast.Detector.evaluate`."""
    vectors = detector.open(source)
    if vectors.labels is None:
        raise InputError(
            "the table has no labels: give the pair (X, y), an .npz with X and y, or a .csv with a "
            "column label"
        )
    found = _score_metrics(detector.score(vectors), vectors.labels)
    milliseconds = latency(detector, next(vectors.batches(1)).x)
    return {
        **found.values,
        "threshold": detector.threshold,
        "latency_ms": milliseconds,
        "undefined": found.undefined,
    }


def evaluate_audio(
    detector: Detector, clips: Sequence[LabelledClip], strict: bool, maps: bool
) -> AudioEvaluation:
    """Score labelled clips, whose ``maps`` a report wants; figures as documented at
    :meth:`diffad_fast.Detector.evaluate`."""
    opened = detector.open([clip.path for clip in clips], strict=strict)
    clips = [clips[i] for i in opened.load()]
    score = detector.score(opened, maps=maps)
    label = np.array([clip.anomaly for clip in clips], dtype=np.int64)
    found = _score_metrics(score, label)
    first = next(opened.batches(1)).x
    milliseconds = latency(detector, first)
    result = {
        **found.values,
        "threshold": detector.threshold,
        "latency_ms": milliseconds,
        "real_time": first.shape[1] / detector.config.sample_rate / milliseconds * 1e3,
        "per_kind": _per_kind(clips, score, label),
        **_per_section(clips, score, label),
        "undefined": found.undefined,
    }
    return AudioEvaluation(clips=clips, score=score, label=label, metrics=result)


def _per_kind(clips: Sequence[LabelledClip], score: Score, label: np.ndarray) -> dict[str, dict]:
    """Figures of each kind of anomaly against all normals."""
    result = {}
    kinds = np.array([clip.kind for clip in clips])
    for kind in sorted(set(kinds[label == 1])):
        rows = (label == 0) | (kinds == kind)
        found = _MetricSet(label[rows])
        found.put("auroc", metrics.auroc, label[rows], score.score[rows])
        found.put("pauc", metrics.pauc, label[rows], score.score[rows])
        result[str(kind)] = {**found.values, "undefined": found.undefined}
    return result


def _per_section(clips: Sequence[LabelledClip], score: Score, label: np.ndarray) -> dict:
    """DCASE Task 2 from 2022 on: in each section the AUROC of one domain's normals against the
    anomalies of both, the pAUC of both domains, and the harmonic mean of all these."""
    sections, every = {}, []
    section = np.array([clip.section for clip in clips])
    domain = np.array([clip.domain for clip in clips])
    for name in sorted(set(section) - {""}):
        own = section == name
        found = _MetricSet(label[own])
        for part in sorted(set(domain[own])):
            rows = own & ((domain == part) | (label == 1))
            found.put(f"auroc_{part}", metrics.auroc, label[rows], score.score[rows])
        found.put("pauc", metrics.pauc, label[own], score.score[own])
        sections[str(name)] = {**found.values, "undefined": found.undefined}
        every += [v for k, v in found.values.items() if not k.startswith("n_")]
    if not sections:
        return {}
    # An AUROC of 0 makes the harmonic mean 0.
    mean = None if None in every else statistics.harmonic_mean(every)
    return {"sections": sections, "harmonic_mean": mean}


def _score_metrics(score: Score, label: np.ndarray) -> _MetricSet:
    """Those that need nothing but a score for each sample."""
    found = _MetricSet(label)
    found.put("auroc", metrics.auroc, label, score.score)
    found.put("pauc", metrics.pauc, label, score.score)
    found.put("f1_max", metrics.f1_max, label, score.score)
    found.put_rates(score)
    return found


def image_labels(tests: Sequence[TestImage]) -> np.ndarray:
    """(N,) int64, 1 for an image with a defect."""
    return np.array([test.defect != "good" for test in tests], dtype=np.int64)


def image_metrics(tests: Sequence[TestImage], score: Score) -> dict:
    """The figures of these images, with ``per_defect`` and, for null ones, ``undefined``."""
    truth = _Truth()
    found, per_defect = _image_metrics(tests, score, truth), {}
    for defect in sorted({test.defect for test in tests} - {"good"}):
        rows = [i for i, test in enumerate(tests) if test.defect in ("good", defect)]
        part = _image_metrics([tests[i] for i in rows], score.take(rows), truth)
        per_defect[defect] = {**part.values, "undefined": part.undefined}
    return {**found.values, "per_defect": per_defect, "undefined": found.undefined}


def _image_metrics(tests: Sequence[TestImage], score: Score, truth: _Truth) -> _MetricSet:
    label = image_labels(tests)
    found = _MetricSet(label)
    found.put("image_auroc", metrics.auroc, label, score.score)
    found.put("f1_max", metrics.f1_max, label, score.score)
    found.put_all(("pixel_auroc", "aupro", "pixel_f1_max"), _pixel_metrics, tests, score, truth)
    found.put_rates(score)
    return found


def _pixel_metrics(tests: Sequence[TestImage], score: Score, truth: _Truth) -> Sequence[float]:
    unmasked = sum(test.defect != "good" and test.mask_path is None for test in tests)
    if unmasked:
        raise InputError(f"{unmasked} defective images have no mask")
    masks = _Masks(tests, truth)
    values = metrics.pixel_metrics(masks, _MapsAtMaskSize(score.map, masks))
    return values["auroc"], values["aupro"], values["f1_max"]


class _MetricSet:
    """Figures of one set of samples, and why any of them is None."""

    def __init__(self, label: np.ndarray):
        self.label = label
        self.values: dict[str, float | int | None] = {
            "n_normal": int((label == 0).sum()),
            "n_anomalous": int(label.sum()),
        }
        self.undefined: dict[str, str] = {}

    def put(self, name: str, metric: Callable[..., float], *arguments) -> None:
        """Take the figure that ``metric`` gives; None where it raises InputError."""
        self.put_all([name], lambda: [metric(*arguments)])

    def put_all(
        self, names: Sequence[str], compute: Callable[..., Sequence[float]], *arguments
    ) -> None:
        """The same for several figures of one calculation."""
        try:
            self.values.update(zip(names, compute(*arguments), strict=True))
        except InputError as error:
            self.values.update(dict.fromkeys(names))
            self.undefined.update(dict.fromkeys(names, str(error)))

    def put_rates(self, score: Score) -> None:
        """Shares of the normal and of the anomalous samples that are labelled anomalous."""
        self.put("false_positive_rate", self._rate, score, 0)
        self.put("true_positive_rate", self._rate, score, 1)

    def _rate(self, score: Score, value: int) -> float:
        if score.label is None:
            raise InputError("too few normals were held out for labels")
        if not (self.label == value).any():
            raise InputError(f"there are no {'anomalous' if value else 'normal'} test samples")
        return float(score.label[self.label == value].mean())


class _Truth:
    """The masks of test images, read from disk each time; what is kept are their sizes."""

    def __init__(self):
        self._sizes: dict[TestImage, tuple[int, int]] = {}

    def mask(self, test: TestImage) -> np.ndarray:
        if test.mask_path is None and test in self._sizes:
            return np.zeros(self._sizes[test], dtype=bool)
        found = read_mask(test.mask_path, test.path)
        self._sizes[test] = found.shape
        return found

    def size(self, test: TestImage) -> tuple[int, int]:
        """(height, width)"""
        return self._sizes[test] if test in self._sizes else self.mask(test).shape


class _Masks:
    """The ground truth of test images at its own size, one at a time."""

    def __init__(self, tests: Sequence[TestImage], truth: _Truth):
        self.tests, self.truth = tests, truth

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.truth.mask, self.tests)


class _MapsAtMaskSize:
    """Maps (N,H,W), each resized bilinearly to its mask's size, one at a time."""

    def __init__(self, maps: np.ndarray, masks: _Masks):
        self.maps, self.masks = maps, masks

    def __iter__(self) -> Iterator[np.ndarray]:
        for map_, test in zip(self.maps, self.masks.tests, strict=True):
            resized = nn.functional.interpolate(
                torch.from_numpy(own_part(map_))[None, None],
                self.masks.truth.size(test),
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
