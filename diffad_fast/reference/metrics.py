"""What the metrics do once a pixel, in NumPy; csrc/metrics.cpp has the same in C++.

``anomalous`` is a dense array of bool, ``scores`` one of float32 or float64, of equal shapes.
"""

from __future__ import annotations

import numpy as np


def all_finite(scores) -> bool:
    """Whether no score is NaN or infinite."""
    return bool(np.isfinite(scores).all())


def anomalous_scores(anomalous, scores, regions):
    """Scores of the anomalous pixels, row by row; size of the region of each.

    Regions are 8-connected and need two axes; without ``regions`` there are no sizes.
    """
    if not regions:
        return scores[anomalous], np.zeros(0, np.uint32)
    from scipy import ndimage

    labels, _ = ndimage.label(anomalous, structure=np.ones((3, 3), dtype=int))
    own = labels[anomalous]
    return scores[anomalous], np.bincount(own)[own].astype(np.uint32)


def distinct_scores(scores, sizes):
    """The distinct scores in ascending order; of each the count and the sum of 1 / size."""
    levels, position, counts = np.unique(scores, return_inverse=True, return_counts=True)
    shares = np.bincount(position.ravel(), weights=1.0 / sizes) if sizes.size else np.zeros(0)
    return levels, counts.astype(np.uint32), shares


class NormalCounter:
    """Counts the normal scores between and at ``levels``, which are finite and ascend. C++ does so
    in up to ``threads`` threads, this in one."""

    def __init__(self, levels, threads):
        self._levels = levels
        self._bins = np.zeros(2 * levels.size + 1, dtype=np.int64)

    def add(self, anomalous, scores):
        normal = np.sort(scores[~anomalous])  # sorted keys make the search below run in cache
        at = np.searchsorted(self._levels, normal)
        equal = self._levels[np.minimum(at, self._levels.size - 1)] == normal
        bin_of = 2 * at + equal
        starts = np.flatnonzero(np.diff(bin_of, prepend=-1))
        self._bins[bin_of[starts]] += np.diff(starts, append=bin_of.size)

    def bins(self):
        """Entry 2k: scores between levels k - 1 and k; entry 2k + 1: those equal to level k."""
        return self._bins


def curve_area(bins, gains, max_fpr):
    """Area under the curve through (share of normal scores, share of ``gains``) up to ``max_fpr``.

    Each level gives two points: normal scores above it with what the previous level reached, and
    normal scores at or above it with what it reaches itself. The line between them is vertical
    without ties and is the tie's diagonal otherwise; between levels the curve is flat, so
    thresholds at normal scores add no area.
    """
    reached = np.cumsum(gains[::-1], dtype=np.float64)
    x = np.append(0, np.cumsum(bins[::-1])) / bins.sum()
    y = np.append([0.0, 0.0], np.repeat(reached / reached[-1], 2))
    stop = int(np.searchsorted(x, max_fpr, side="right"))
    if stop < x.size:
        end = np.interp(max_fpr, x[stop - 1 : stop + 1], y[stop - 1 : stop + 1])
        x, y = np.append(x[:stop], max_fpr), np.append(y[:stop], end)
    return float(0.5 * np.dot(np.diff(x), y[1:] + y[:-1]))


def f1_max(bins, counts):
    """Largest F1 = 2TP / (TP + FP + positives).

    Lowering the threshold between two anomalous scores only adds false positives, so it is met at
    an anomalous score.
    """
    hits = np.cumsum(counts[::-1], dtype=np.int64)
    predicted = hits + np.cumsum(bins[::-1])[1::2]
    return float((2.0 * hits / (predicted + hits[-1])).max())
