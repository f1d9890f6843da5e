"""Conformal p-values and labels from the scores of held-out normals."""

from __future__ import annotations

import numpy as np

# With n groups the smallest p-value is 1/(n + 1): below 20 it could not reach the usual 5%, and a
# threshold would rest on one or two objects.
SMALLEST_CALIBRATION = 20


class Conformal:
    """p = (1 + sum over groups of the share of a group's scores that are >= s) / (groups + 1).

    With one score a group that is (1 + #{scores >= s}) / (n + 1) (Vovk et al. 2005; Bates et al.
    2023). Scores of one object are no independent evidence, and count as one together (Lee, Barber
    & Willett 2023, "Distribution-free inference with hierarchical data"): with the new sample's own
    group among groups + 1 that are exchangeable, s is a draw from the mean of their distributions,
    and p, in which that group counts whole, is at least this mean's tail.

    scores: (n,) of normals that neither the model nor the statistics have seen: then p is valid
    for a sample of a new group like these, p <= u with a probability of at most u for u in [0, 1].
    Groups too large for the held-out parts are not among them (``split_by_group``). Or each by
    a model that has not seen it while the one in use has seen all (after the cross-conformal
    predictors of Vovk 2015): then p is as good as the models are alike, without a guarantee.
    group: (n,) integers, the object of each score; None: each has its own. With fewer than 20
    groups there is no label.
    """

    def __init__(self, scores: np.ndarray, group: np.ndarray | None, false_positive_rate: float):
        scores = np.asarray(scores, dtype=np.float64)
        group = np.arange(len(scores)) if group is None else np.asarray(group, dtype=np.int64)
        order = np.argsort(scores, kind="stable")
        self.scores, self.group = scores[order], group[order]
        self.false_positive_rate = false_positive_rate
        _, number, sizes = np.unique(self.group, return_inverse=True, return_counts=True)
        self.groups = len(sizes)
        # tail[i]: groups of which scores[i:] consist, in shares. Rounded, for sums of shares like
        # 1/10 miss whole groups by some 1e-15, and p the rate, or 1, that it equals.
        tail = np.cumsum((1 / sizes)[number][::-1])[::-1]
        self.tail = np.append(tail.round(9), 0.0)

    def at_rate(self, false_positive_rate: float) -> Conformal:
        """The same scores with the threshold of another rate."""
        return Conformal(self.scores, self.group, false_positive_rate)

    @property
    def threshold(self) -> float | None:
        """The score above which an image is labelled anomalous; None where no label is given.

        p <= rate where the tail from s on is at most rate (groups + 1) - 1, that is: s lies above
        the largest calibration score whose tail is longer.
        """
        # The small term keeps a product such as 0.05 * 20 = 1.0000000000000002 - eps on its side.
        longest = self.false_positive_rate * (self.groups + 1) - 1 + 1e-9
        if self.groups < SMALLEST_CALIBRATION or longest < 0:
            return None
        return float(self.scores[np.count_nonzero(self.tail > longest) - 1])

    def p_value(self, scores: np.ndarray) -> np.ndarray:
        """(N,) float64 in [1/(groups+1), 1] for scores (N,)."""
        below = np.searchsorted(self.scores, scores, side="left")
        return (1 + self.tail[below]) / (self.groups + 1)

    def label(self, scores: np.ndarray) -> np.ndarray | None:
        """(N,) int64, 1 for an anomaly, NaN among them; None where the calibration is too small."""
        threshold = self.threshold
        return None if threshold is None else (~(np.asarray(scores) <= threshold)).astype(np.int64)

    def why_no_label(self) -> str:
        """One sentence, for the warning that goes with a label of None."""
        if self.groups < SMALLEST_CALIBRATION:
            return (
                f"labels need at least {SMALLEST_CALIBRATION} held-out normal groups, and there "
                f"are {self.groups}: recalibrate with more, or fit on more objects or recordings; "
                "where a fit holds out parts, hold out more, by a larger conformal_share, or all "
                "by cross_fit=5 (token MLP)"
            )
        return (
            f"a false-positive rate of {self.false_positive_rate:g} cannot be reached with "
            f"{self.groups} held-out normal groups: fit on more, recalibrate with more, or raise "
            "false_positive_rate"
        )
