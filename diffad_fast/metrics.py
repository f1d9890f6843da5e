"""Exact detection metrics that stream over the data: AUROC, partial AUROC, F1-max and AUPRO.

Anomalous scores are few, normal ones are many, and every metric here changes only where the
threshold crosses an anomalous score. So the distinct anomalous scores are sorted once, and the
normal scores are counted between and at them, one image after another: O(N log N) time, and memory
for one image and the anomalous pixels.

Everywhere a higher score means "more anomalous" and a label > 0 is an anomaly. A metric that the
data leaves undefined (only one class) raises `InputError` and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
import torch

from . import native
from .arrays import check_unmasked, to_numpy
from .errors import InputError
from .reference import metrics as _in_numpy

__all__ = ["aupro", "auroc", "f1_max", "pauc", "pixel_metrics"]

_BLOCK = 1 << 20  # scores of a whole array that are looked at together
_END = object()
# What is done once a pixel: in C++, or in NumPy where the native module was not built.
_engine = native._host or _in_numpy


def auroc(labels, scores) -> float:
    """Area under the ROC curve, ties counted half; in [0, 1].

    Args:
        labels: bool or numbers, > 0 is an anomaly. An array, tensor or sequence of numbers of any
            shape, or a sequence of arrays, one an image (sizes may differ).
        scores: real numbers of the same shape(s).

    Raises:
        InputError: shapes differ, a value is NaN, infinite or masked, or only one class is there.
    """
    return _Counts(lambda: _flat_pairs(labels, scores)).auroc()


def pauc(labels, scores, max_fpr: float = 0.1) -> float:
    """Partial area under the ROC curve up to `max_fpr`; in [0, 1], standardised: chance is 0.5.

    Equals `sklearn.metrics.roc_auc_score(labels, scores, max_fpr=max_fpr)`, which DCASE's evaluator
    uses (McClish, "Analyzing a portion of the ROC curve", 1989).

    Args:
        labels, scores: as for `auroc`.
        max_fpr: the largest false-positive rate, in (0, 1].

    Raises:
        InputError: as for `auroc`, or `max_fpr` is out of range.
    """
    max_fpr = _rate(max_fpr)
    return _Counts(lambda: _flat_pairs(labels, scores)).pauc(max_fpr)


def f1_max(labels, scores) -> float:
    """Largest F1 = 2PR/(P+R) over all thresholds ("anomaly" means score >= threshold); in (0, 1].

    Args:
        labels, scores: as for `auroc`.

    Raises:
        InputError: as for `auroc`.
    """
    return _Counts(lambda: _flat_pairs(labels, scores)).f1_max()


def aupro(masks, maps, max_fpr: float = 0.3) -> float:
    """Area under the per-region overlap curve, as MVTec AD defines it; in [0, 1].

    At each distinct threshold the overlap is the mean, over the 8-connected regions of the ground
    truth of all images, of the share of the region whose score reaches the threshold; the
    false-positive rate is taken over all normal pixels of all images. The curve starts at (0, 0),
    is joined by straight lines (interpolated at `max_fpr`), integrated to `max_fpr` and divided by
    it.
    Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.

    Args:
        masks: ground truth, > 0 is an anomaly: an array or tensor (N, H, W), or anything that can
            be iterated twice and gives (H, W) arrays, whose sizes may differ.
        maps: anomaly maps, the same.
        max_fpr: where to stop, in (0, 1].

    Raises:
        InputError: shapes differ, an image is not 2-D, a score is NaN, infinite or masked, no
            pixel or every pixel is anomalous, or `max_fpr` is out of range.
    """
    max_fpr = _rate(max_fpr)
    return _Counts(lambda: _image_pairs(masks, maps), regions=True).aupro(max_fpr)


def pixel_metrics(masks, maps, max_fpr: float = 0.3) -> dict[str, float]:
    """`auroc`, `aupro` and `f1_max` of the pixels in one pair of passes over `masks` and `maps`.

    Both are iterated exactly twice, side by side, so they may be computed as they are read.

    Args:
        masks, maps, max_fpr: as for `aupro`.

    Raises:
        InputError: as for `aupro`.
    """
    max_fpr = _rate(max_fpr)
    counts = _Counts(lambda: _image_pairs(masks, maps), regions=True)
    return {"auroc": counts.auroc(), "aupro": counts.aupro(max_fpr), "f1_max": counts.f1_max()}


class _Counts:
    """What lies at each distinct anomalous score and between them.

    Args:
        pairs: called twice; gives (anomalous, scores) array pairs of equal shape, the same ones
            both times.
        regions: also measure the overlap with the connected regions of each pair (2-D images).
    """

    def __init__(
        self, pairs: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]], regions: bool = False
    ):
        found, sizes = [], []
        num_normal = 0
        dtype = np.dtype(np.float32)
        for anomalous, scores in pairs():
            values, size = _engine.anomalous_scores(anomalous, scores, regions)
            num_normal += scores.size - values.size
            dtype = np.promote_types(dtype, scores.dtype)
            if values.size:
                found.append(values)
                sizes.append(size)
        if not found:
            raise InputError("no label is > 0: without an anomaly the metric is undefined.")
        if num_normal == 0:
            raise InputError("every label is > 0: without normal data the metric is undefined.")

        found = np.concatenate(found, dtype=dtype)
        sizes = np.concatenate(sizes)
        levels, self._counts, self._shares = _engine.distinct_scores(found, sizes)
        del found, sizes
        counter = _engine.NormalCounter(levels, torch.get_num_threads())
        del levels
        for anomalous, scores in pairs():
            counter.add(anomalous, scores.astype(dtype, copy=False))
        self._bins = counter.bins()

    def auroc(self) -> float:
        return _engine.curve_area(self._bins, self._counts, 1.0)

    def pauc(self, max_fpr: float) -> float:
        chance = 0.5 * max_fpr**2
        area = _engine.curve_area(self._bins, self._counts, max_fpr)
        return 0.5 * (1.0 + (area - chance) / (max_fpr - chance))

    def aupro(self, max_fpr: float) -> float:
        return min(_engine.curve_area(self._bins, self._shares, max_fpr) / max_fpr, 1.0)

    def f1_max(self) -> float:
        return _engine.f1_max(self._bins, self._counts)


def _rate(max_fpr) -> float:
    try:
        rate = float(max_fpr)
    except (TypeError, ValueError, RuntimeError):
        rate = 0.0
    if isinstance(max_fpr, str) or not 0.0 < rate <= 1.0:
        raise InputError(f"max_fpr is {max_fpr!r}: give a false-positive rate in (0, 1].")
    return rate


def _flat_pairs(labels, scores) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(anomalous, scores) pairs whose shapes have no meaning."""
    if not (_is_whole(labels) and _is_whole(scores)):
        yield from _item_pairs(labels, scores)
        return
    labels, scores = _array(labels, "labels"), _array(scores, "scores")
    _check_shapes(labels.shape, scores.shape)
    labels, scores = labels.reshape(-1), scores.reshape(-1)
    for start in range(0, labels.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        yield _anomalous(labels[part]), _finite(scores[part])


def _image_pairs(masks, maps) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(anomalous, scores) pairs, each (H, W)."""
    for anomalous, scores in _item_pairs(masks, maps):
        if anomalous.ndim != 2:
            raise InputError(
                f"masks and maps hold an image of shape {anomalous.shape}: give (N, H, W) arrays "
                "or sequences of (H, W) arrays."
            )
        yield anomalous, scores


def _item_pairs(labels: Iterable, scores: Iterable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for values in (labels, scores):
        if not isinstance(values, Iterable) or isinstance(values, Iterator):
            raise InputError(
                "labels and scores are read twice, which does not work with a "
                f"{type(values).__name__}: give arrays, or lists of arrays."
            )
    if hasattr(labels, "shape") and hasattr(scores, "shape"):
        _check_shapes(tuple(labels.shape), tuple(scores.shape))
    for number, (label, score) in enumerate(zip_longest(labels, scores, fillvalue=_END)):
        if label is _END or score is _END:
            longer = "scores" if label is _END else "labels"
            raise InputError(
                f"labels and scores differ in length: {longer} go on after {number} items."
            )
        label, score = _array(label, "labels"), _array(score, "scores")
        _check_shapes(label.shape, score.shape, f" in item {number}")
        if label.ndim == 0:
            raise InputError(
                f"labels and scores hold single numbers in a {type(labels).__name__} and a "
                f"{type(scores).__name__}: give arrays, or lists."
            )
        yield _anomalous(label), _finite(score)


def _is_whole(values) -> bool:
    """Whether `values` is one array (or a sequence of numbers), not a sequence of arrays."""
    if isinstance(values, Sequence):
        return not values or not getattr(values[0], "ndim", hasattr(values[0], "__len__"))
    return hasattr(values, "shape")


def _array(values, what: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = to_numpy(values)
    check_unmasked(values, f"{what} have", "leave these out.")
    values = np.asarray(values, order="C")
    if values.dtype.kind not in "biuf":
        raise InputError(f"{what} are of dtype {values.dtype}: give booleans or real numbers.")
    return values


def _anomalous(labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise InputError("labels hold NaN: give 0 for normal and 1 for anomalous.")
    return labels if labels.dtype == bool else labels > 0


def _finite(scores: np.ndarray) -> np.ndarray:
    """`scores` as float32, if it holds them all, or float64; none is NaN or infinite."""
    narrow = scores.dtype.kind == "f" and scores.dtype.itemsize <= 4
    scores = scores.astype(np.float32 if narrow else np.float64, copy=False)
    if not _engine.all_finite(scores):
        raise InputError("scores hold NaN or infinite values, which have no order: remove them.")
    return scores


def _check_shapes(labels: tuple, scores: tuple, where: str = "") -> None:
    if labels != scores:
        raise InputError(
            f"labels of shape {labels} and scores of shape {scores} differ{where}: "
            "each label needs one score."
        )
