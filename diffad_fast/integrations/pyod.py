"""PyOD: a detector for tables, embeddings and images."""

from __future__ import annotations

import numpy as np

from ._estimator import anomaly_scores, fit_detector, plain_float32
from ._host import require

require("pyod")

from pyod.models.base import BaseDetector  # noqa: E402
from sklearn.utils.validation import check_array, check_is_fitted  # noqa: E402

__all__ = ["DiffAD"]


class DiffAD(BaseDetector):
    """:class:`diffad_fast.Detector` as a PyOD detector: 0 for inliers, 1 for outliers.

    Parameters
    ----------
    contamination : float in (0, 0.5], default=0.1
        Share of the training samples that are called outliers; sets `threshold_`.
    preset : {"fast", "balanced", "best"}, default="balanced"
        The recipe: how long is trained and with which denoiser.
    train_steps : int, default=None
        Optimisation steps; None: those of the preset.
    options : dict, default=None
        Further arguments of :class:`diffad_fast.Detector` by name, which come before these. Of
        modules among them a copy is trained.
    device : str, default=None
        "cpu", "cuda", ...; None: the best there is.
    random_state : int, RandomState instance or None, default=None
        Seeds weights, batches and the choice of held-out samples.

    Attributes
    ----------
    detector_ : Detector
        Fitted on the training samples, parts of which it holds out.
    decision_scores_, labels_, threshold_
        As in every PyOD detector.

    X is (n_samples, n_features), or images (n_samples, channels, height, width) in [0, 1]; at least
    8 samples.
    """

    def __init__(
        self,
        contamination=0.1,
        preset="balanced",
        train_steps=None,
        options=None,
        device=None,
        random_state=None,
    ):
        super().__init__(contamination=contamination)
        self.preset = preset
        self.train_steps = train_steps
        self.options = options
        self.device = device
        self.random_state = random_state

    def fit(self, X, y=None):
        """Fit on X; y is not looked at. Returns self. Raises ValueError for unusable data."""
        # In the precision of the data, of which the detector says whether float32 can hold it.
        X = check_array(X, dtype=(np.float64, np.float32), allow_nd=True)
        self._set_n_classes(y)
        self.detector_ = fit_detector(
            X, self.preset, self.train_steps, self.options, self.device, self.random_state
        )
        self.decision_scores_ = anomaly_scores(self.detector_, X.astype(np.float32, copy=False))
        self._process_decision_scores()
        return self

    def decision_function(self, X):
        """(n_samples,) float64, higher is more anomalous."""
        # The check collects the tags of all classes: a per cent of the score of a small batch.
        if not hasattr(self, "labels_"):
            check_is_fitted(self, ["decision_scores_", "threshold_", "labels_"])
        return anomaly_scores(self.detector_, self._checked(X))

    @staticmethod
    def _checked(X) -> np.ndarray:
        plain = plain_float32(X)
        if plain is not None and plain.ndim > 1:
            return plain
        return check_array(X, dtype=np.float32, allow_nd=True)
