"""What the metrics do once a pixel, in NumPy; csrc/metrics.cpp has the same in C++.

``anomalous`` is a dense array of bool, ``scores`` one of float32 or float64, of equal shapes.
"""

from __future__ import annotations

import numpy as np


def all_finite(scores) -> bool:
    """Whether no score is NaN or infinite."""
    return bool(np.isfinite(scores).all())


def anomalous_scores(anomalous, scores, regions):
    """Scores of the anomalous pixels, row by row; size of the region of each; number of regions.

    Regions are 8-connected and need two axes; without ``regions`` there are no sizes.
    """
    if not regions:
        return scores[anomalous], np.zeros(0, np.uint32), 0
    from scipy import ndimage

    labels, number = ndimage.label(anomalous, structure=np.ones((3, 3), dtype=int))
    own = labels[anomalous]
    return scores[anomalous], np.bincount(own)[own].astype(np.uint32), number


def distinct_scores(scores, sizes):
    """The distinct scores in ascending order; of each the count and the sum of 1 / size."""
    levels, position, counts = np.unique(scores, return_inverse=True, return_counts=True)
    shares = np.bincount(position.ravel(), weights=1.0 / sizes) if sizes.size else np.zeros(0)
    return levels, counts, shares


class NormalCounter:
    """Counts the normal scores between and at ``levels``, which are finite and ascend."""

    def __init__(self, levels):
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
