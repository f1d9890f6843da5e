"""Conformal p-values and labels from the scores of held-out normals."""

from __future__ import annotations

import numpy as np

# With n calibration scores the smallest p-value is 1/(n + 1): below 20 groups it could not reach
# the usual 5%, and a threshold would rest on one or two images.
SMALLEST_CALIBRATION = 20


class Conformal:
    """p = (1 + #{calibration scores >= s}) / (n + 1) (Vovk et al. 2005; Bates et al. 2023).

    scores: (n,) of normals that neither the model nor the statistics have seen: then p is valid,
    p <= u with a probability of at most u for u in [0, 1]. Or each by a model that has not seen it
    while the one in use has seen all (after the cross-conformal predictors of Vovk 2015): then p is
    as good as the models are alike, without a guarantee.
    groups: how many independent objects these scores come from; below 20 there is no label.
    """

    def __init__(self, scores: np.ndarray, groups: int, false_positive_rate: float):
        self.scores = np.sort(np.asarray(scores, dtype=np.float64))
        self.groups = groups
        self.false_positive_rate = false_positive_rate

    @property
    def threshold(self) -> float | None:
        """The score above which an image is labelled anomalous; None where no label is given.

        p <= rate is #{calibration >= s} <= m with m = floor(rate (n + 1)) - 1, that is: s lies
        above the (m + 1)-th largest calibration score.
        """
        n = len(self.scores)
        # The small term keeps a product such as 0.05 * 20 = 1.0000000000000002 - eps on its side.
        m = int(np.floor(self.false_positive_rate * (n + 1) + 1e-9)) - 1
        if self.groups < SMALLEST_CALIBRATION or not 0 <= m < n:
            return None
        return float(self.scores[n - 1 - m])

    def p_value(self, scores: np.ndarray) -> np.ndarray:
        """(N,) float64 in [1/(n+1), 1] for scores (N,)."""
        n = len(self.scores)
        below = np.searchsorted(self.scores, scores, side="left")
        return (1 + n - below) / (n + 1)

    def label(self, scores: np.ndarray) -> np.ndarray | None:
        """(N,) int64, 1 for an anomaly, NaN among them; None where the calibration is too small."""
        threshold = self.threshold
        return None if threshold is None else (~(np.asarray(scores) <= threshold)).astype(np.int64)

    def why_no_label(self) -> str:
        """One sentence, for the warning that goes with a label of None."""
        if self.groups < SMALLEST_CALIBRATION:
            return (
                f"labels need at least {SMALLEST_CALIBRATION} held-out normal groups, and there "
                f"are {self.groups}: fit on more objects or recordings, or hold out more of them, "
                "by a larger conformal_share, or all by cross_fit=5 with the token MLP"
            )
        return (
            f"a false-positive rate of {self.false_positive_rate:g} cannot be reached with "
            f"{len(self.scores)} held-out normals: fit on more or raise false_positive_rate"
        )
