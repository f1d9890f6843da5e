import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.neighbors import NearestNeighbors

from diffad_fast.scoring import FeatureDistance


def test_mahalanobis_is_scipys():
    normal = torch.randn(300, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    distance = FeatureDistance("mahalanobis")
    distance.fit(normal.float().split(77), seed=0)
    new = torch.randn(2, 3, 5) * 4
    inverse = np.linalg.inv(np.cov(normal.numpy().T, ddof=0))
    centre = normal.mean(dim=0).numpy()
    expected = [mahalanobis(x, centre, inverse) ** 2 / 5 for x in new.reshape(-1, 5).numpy()]
    # The eigenvalue floor acts here too, on directions below a thousandth of the largest.
    assert distance(new).flatten().numpy() == pytest.approx(np.array(expected), rel=2e-3)
    assert distance(new).shape == (2, 3)


def test_nearest_is_scikit_learns():
    normal, new = torch.randn(200, 4) * 3, torch.randn(50, 4) * 5
    distance = FeatureDistance("nearest")
    distance.fit(normal.split(64), seed=0)
    found = NearestNeighbors(n_neighbors=5).fit(normal.numpy()).kneighbors(new.numpy())[0]
    expected = found.mean(axis=1) / normal.numpy().var(axis=0).sum() ** 0.5
    assert distance(new).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)
