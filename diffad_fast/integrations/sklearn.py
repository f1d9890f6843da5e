"""scikit-learn: an outlier detector for tables, embeddings and flattened images."""

from __future__ import annotations

import operator
from numbers import Real

import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from ..errors import InputError
from ..scoring.split import SMALLEST_SET
from ._estimator import anomaly_scores, fit_detector, plain_float32

__all__ = ["DiffusionOutlierDetector"]


class DiffusionOutlierDetector(OutlierMixin, BaseEstimator):
    """:class:`diffad_fast.Detector` as a scikit-learn estimator.

    Parameters
    ----------
    preset : {"fast", "balanced", "best"}, default="balanced"
        The recipe: how long is trained and with which denoiser.
    contamination : float in (0, 0.5], default=0.1
        Share of the training samples that `predict` calls outliers; sets `offset_`.
    image_shape : tuple (H, W) or (C, H, W), default=None
        Rows are flattened images of this shape with values in [0, 1]; None: rows are vectors.
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
        Fitted on the training samples, parts of which it holds out: p-values, maps, other modes.
    offset_ : float
        `decision_function` is `score_samples` less this.
    n_features_in_, feature_names_in_
        As in every estimator.

    At least 8 samples are needed, and some hundreds for a useful detector. Sparse matrices and
    missing values are refused.
    """

    def __init__(
        self,
        preset="balanced",
        *,
        contamination=0.1,
        image_shape=None,
        train_steps=None,
        options=None,
        device=None,
        random_state=None,
    ):
        self.preset = preset
        self.contamination = contamination
        self.image_shape = image_shape
        self.train_steps = train_steps
        self.options = options
        self.device = device
        self.random_state = random_state

    def fit(self, X, y=None):
        """Fit on X (n_samples, n_features), an array or data frame; y is not looked at.

        Returns self. Raises ValueError for fewer than 8 samples and for unusable data.
        """
        if not isinstance(self.contamination, Real) or not 0 < self.contamination <= 0.5:
            raise InputError(f"contamination must be in (0, 0.5], not {self.contamination!r}")
        # In the precision of the data, of which the detector says whether float32 can hold it.
        kinds = (np.float64, np.float32)
        X = validate_data(self, X, dtype=kinds, ensure_min_samples=SMALLEST_SET)
        self.detector_ = fit_detector(
            self._samples(X), self.preset, self.train_steps, self.options, self.device,
            self.random_state,
        )  # fmt: skip
        scores = self._score(X.astype(np.float32, copy=False))
        self.offset_ = float(np.percentile(scores, 100 * self.contamination))
        return self

    def score_samples(self, X):
        """(n_samples,) float64, lower is more anomalous: the detector's score, negated."""
        # The check collects the tags of all classes: a per cent of the score of a small batch.
        if not hasattr(self, "detector_"):
            check_is_fitted(self)
        return self._score(self._checked(X))

    def decision_function(self, X):
        """`score_samples(X) - offset_`: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X):
        """(n_samples,) int: -1 for outliers, 1 for inliers."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _checked(self, X) -> np.ndarray:
        """X as `validate_data` gives it, which looks at names and kinds that a plain array of the
        right width does not have."""
        plain = None if hasattr(self, "feature_names_in_") else plain_float32(X)
        if plain is not None and plain.ndim == 2 and plain.shape[1] == self.n_features_in_:
            return plain
        return validate_data(self, X, dtype=np.float32, reset=False)

    def _score(self, X: np.ndarray) -> np.ndarray:
        return -anomaly_scores(self.detector_, self._samples(X))

    def _samples(self, X: np.ndarray) -> np.ndarray:
        """Rows as they are, or as images (N,C,H,W)."""
        return X if self.image_shape is None else X.reshape(-1, *self._image_shape())

    def _image_shape(self) -> tuple[int, int, int]:
        try:
            shape = tuple(map(operator.index, self.image_shape))
        except TypeError:
            shape = ()
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise InputError(f"image_shape is (H, W) or (C, H, W), not {self.image_shape!r}")
        shape = shape if len(shape) == 3 else (1, *shape)
        if np.prod(shape) != self.n_features_in_:
            raise InputError(
                f"image_shape {self.image_shape!r} has {np.prod(shape)} values and a row of X has "
                f"{self.n_features_in_}"
            )
        return shape
