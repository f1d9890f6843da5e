"""Closed forms in the place of a detector's learned denoisers, on the very same tokens.

Everything else stays: representation, smoothing, standardisation on held-out normals, fusion.
Beside them, for vectors, nearest neighbours as scikit-learn has them, without any of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn

from diffad_fast import Detector
from diffad_fast.calibration import Part
from diffad_fast.representations import VectorTokens
from diffad_fast.scoring import FeatureDistance

CONTROLS = ("Gaussian", "PCA residual", "kNN")
NEAREST, NEIGHBOURS = "nearest, all normals", 5
# Share of the variance that the principal components keep.
PCA_SHARE = 0.95


def controls(detector: Detector, samples) -> Iterator[tuple[str, Detector]]:
    """(name, calibrated detector) of each control, for a detector on tokens, fitted on
    ``samples``."""
    samples = detector.open(samples)
    for name in CONTROLS:
        control = copy.copy(detector)
        control.calibrations, control.parts = {}, []
        control._fitted_on = detector._fitted_on
        for model, split in detector.parts:
            control.parts.append(Part(_control(name, model, samples, split.fit), split))
        if len(detector.parts) == 1:
            control.model = control.parts[0].model
        else:
            control.model = _control(name, detector.model, samples, samples.load())
        control.calibrate(samples, [detector.mode])
        yield name, control


def nearest(train: np.ndarray, test: np.ndarray, metric: str = "euclidean") -> np.ndarray:
    """Mean distance of rows to the NEIGHBOURS nearest of all of ``train``, or to as many as there
    are. Nothing needs to be held out for it."""
    known = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train)), metric=metric).fit(train)
    return known.kneighbors(test)[0].mean(axis=1)


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both by the mean and deviation of ``train``."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation[deviation == 0] = 1.0
    return (train - mean) / deviation, (test - mean) / deviation


def _control(name: str, model, samples, indices):
    """A copy of ``model`` whose denoisers are closed forms, fitted on the normals ``indices``."""
    banks = model._banks(samples, indices)
    # Statistics are attributes of the mode that is in use, and the copy gets its own.
    copied = copy.deepcopy(model)
    copied.distances = nn.ModuleList()
    copied.closed_forms = _forms(name, copied, banks)
    copied.use(None)
    return copied


def _forms(name: str, model, banks: list[torch.Tensor]) -> list[Callable]:
    """A distance of tokens (M,dim) for each source."""
    forms: list[Callable] = []
    for i, bank in enumerate(banks):
        if name == "PCA residual":
            forms.append(_pca_residual(bank, _unwhitened(model.representation, i)))
            continue
        distance = FeatureDistance("mahalanobis" if name == "Gaussian" else "nearest")
        distance.fit(bank.split(8192), seed=0)
        forms.append(distance)
    return forms


def _unwhitened(representation, source: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """From tokens back to what they were before whitening, which has no principal components."""
    if isinstance(representation, VectorTokens):
        return lambda rows: rows
    inverse = torch.linalg.inv(representation.whitenings[source].matrix.double()).float()
    return lambda rows: rows @ inverse


def _pca_residual(bank: torch.Tensor, back: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    rows = back(bank)
    mean = rows.mean(dim=0)
    values, directions = torch.linalg.eigh(torch.cov((rows - mean).T.double()))
    # The smallest eigenvalues stand first; what they span is the residual.
    count = int((values.cumsum(0) / values.sum() <= 1 - PCA_SHARE).sum())
    left_out = directions[:, : max(1, count)].float()
    return lambda x: ((back(x) - mean) @ left_out).square().sum(dim=1)
