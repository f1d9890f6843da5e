"""What the estimators of scikit-learn and PyOD share: a detector fitted on an array."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from sklearn.utils import check_random_state

from ..detector import Detector
from ..errors import InputError


def fit_detector(X, preset, train_steps, options, device, random_state) -> Detector:
    """A detector of the kind that X asks for: vectors (N,D), or images (N,C,H,W) in [0,1].

    random_state: None, an integer or a RandomState, as in scikit-learn. What is in ``options``
    comes first: its ``seed``, ``preset`` and ``device`` too. Its modules are copied: a fit leaves
    the parameters of an estimator as they are.
    """
    if not isinstance(options, Mapping | None):
        raise InputError(f"options is a dictionary of options by name, not {options!r}")
    seed = int(check_random_state(random_state).randint(2**31 - 1))
    chosen = {"seed": seed, "preset": preset, "device": device}
    if X.ndim == 2:
        chosen["kind"] = "vector"
    elif X.ndim == 4:
        chosen |= {"channels": X.shape[1], "image_size": X.shape[2:]}
    else:
        raise InputError(
            f"X has shape {X.shape}: give rows (n_samples, n_features) or images "
            "(n_samples, channels, height, width)"
        )
    if train_steps is not None:
        chosen["train_steps"] = train_steps
    chosen |= copy.deepcopy(dict(options or {}))
    return Detector(**chosen).fit(X)


def plain_float32(X) -> np.ndarray | None:
    """X in float32 if it is a NumPy array of finite floating-point numbers, else None.

    ``check_array(X, dtype=np.float32)`` hands such an array back as it is, apart from its number of
    dimensions, and the ways it goes to see that take a tenth of the time of a small batch's score.
    """
    if type(X) is not np.ndarray or X.dtype not in (np.float32, np.float64) or not X.size:
        return None
    with np.errstate(over="ignore"):
        X = X.astype(np.float32, copy=False)
    return X if np.isfinite(X).all() else None


def anomaly_scores(detector: Detector, X: np.ndarray) -> np.ndarray:
    """(N,) float64, higher is more anomalous; without p-values and labels, which need more
    held-out samples than small tables have.

    X: float32, of the shape that the detector was fitted on, checked by the host.
    """
    size = detector.config.batch_size
    if detector.config.kind == "vector" and X.shape[1] == detector.model.representation.dims[0]:
        # Opening a table again would cost a few per cent of a small batch's score.
        starts = range(0, len(X), size)
        parts = (torch.from_numpy(np.array(X[i : i + size], order="C")) for i in starts)
    else:
        parts = (batch.x for batch in detector.open(X).batches(size))
    return np.concatenate([detector.score_batch(x, maps=False)[1] for x in parts])
