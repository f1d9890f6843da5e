import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.neighbors import NearestNeighbors

from diffad_fast import use_backend
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


def test_nobody_is_his_own_neighbour():
    """Rows of the sample, with the rounding of another batch, have their five nearest others."""
    normal = torch.randn(200, 4) * 3 + 20
    distance = FeatureDistance("nearest")
    distance.fit(normal.split(64), seed=0)
    found = NearestNeighbors(n_neighbors=6).fit(normal.numpy()).kneighbors(normal.numpy())[0]
    expected = found[:, 1:].mean(axis=1) / normal.numpy().var(axis=0).sum() ** 0.5
    assert distance(normal).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert distance(normal * (1 + 2e-7)).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    # One of two twins is a neighbour of the other.
    distance.fit([normal.repeat(2, 1)], seed=0)
    twins = np.repeat(found[:, 1:3], 2, axis=1)  # 1, 1, 2, 2
    expected = twins.sum(axis=1) / 5 / normal.numpy().var(axis=0).sum() ** 0.5
    assert distance(normal).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_few_neighbours():
    for count in (1, 3):
        one = FeatureDistance("nearest")
        one.fit([torch.randn(count, 2)], seed=0)
        assert one(torch.randn(4, 2)).isfinite().all() and (one(one.sample) >= 0).all()


@pytest.mark.native
def test_a_batch_does_not_matter():
    distance = FeatureDistance("nearest")
    distance.fit([torch.randn(700, 8)], seed=0)
    x = torch.randn(300, 8)
    found = distance(x)
    assert all(torch.equal(distance(x[:n]), found[:n]) for n in (1, 3, 50))
    with use_backend("reference"):
        torch.testing.assert_close(distance(x), found, rtol=2e-7, atol=0)


def test_a_program_takes_any_number_of_rows():
    distance = FeatureDistance("nearest")
    distance.fit([torch.randn(700, 8)], seed=0)
    x = torch.randn(30, 8)
    shapes = {"features": {0: torch.export.Dim("batch")}}
    program = torch.export.export(distance, (x,), dynamic_shapes=shapes).module()
    for rows in (x, x[:2], x.repeat(9, 1)):
        assert torch.allclose(program(rows), distance(rows), rtol=1e-6)
