"""Closed forms and nearest neighbours."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from benchmarks.quality import controls


def test_principal_components_keep_most_of_the_variance():
    # Deviations on axes: the last two hold 4% of the variance, the last three 10%.
    deviation = torch.tensor([80.0, 10.0, 6.0, 3.0, 1.0]).sqrt()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)))
    residual = controls._pca_residual(5 + signs * deviation, lambda rows: rows)
    found = residual(5 + 2 * torch.eye(5))
    torch.testing.assert_close(found, torch.tensor([0.0, 0, 0, 4, 4]), atol=1e-10, rtol=1e-6)


def test_nearest_of_all_normals_are_scikit_learns():
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    rng = np.random.default_rng(0)
    train, test = (rng.standard_normal((n, 3)) * [1, 100, 0] + [0, 5, 7] for n in (30, 9))
    scaler = preprocessing.StandardScaler().fit(train)
    known, new = scaler.transform(train), scaler.transform(test)
    distance = np.sort(np.linalg.norm(new[:, None] - known[None], axis=2), axis=1)[:, :5]
    np.testing.assert_allclose(
        controls.nearest(*controls.standardised(train, test)), distance.mean(axis=1)
    )
