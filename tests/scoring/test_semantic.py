import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.neighbors import NearestNeighbors

from diffad_fast.scoring import FeatureDistance, semantic


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
    one = FeatureDistance("nearest")
    one.fit([torch.randn(3, 2)], seed=0)
    assert one(torch.randn(4, 2)).isfinite().all() and (one(one.sample) >= 0).all()


def neighbours(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """40 rows and a sample of 500, of a kind."""
    x = torch.randn(500 + 40, 24, generator=torch.Generator().manual_seed(1))
    if case == "far":  # of which float32 cannot tell who is nearest: |a|^2 is a million times more
        x += 1e3
    elif case == "twins":
        x = x[torch.arange(540) % 20]
    elif case == "alike":  # all of them but for the last digits
        x = 1 + 1e-4 * x
    elif case == "tiny":  # beyond what squares of float32 hold
        x *= 1e-22
    elif case == "huge":
        x *= 1e22
    elif case == "overflow":  # where the nearest seems to be the farthest, whatever is added first
        x = torch.linspace(5e17, 5e18, 540)[:, None].repeat(1, 2)
        x[:2] = torch.tensor([[1.1e19, 1.3e19], [1.3e19, 1.1e19]])
        x[500:] = torch.tensor([[-1e20, 1e20], [1e20, -1e20]]).repeat(20, 1)
    elif case == "outlier":
        x[0] *= 1e4
    elif case == "zero":
        x[:500] = 0
    return x[500:], x[:500]


@pytest.mark.parametrize(
    "case", ["plain", "far", "twins", "alike", "tiny", "huge", "overflow", "outlier", "zero"]
)
@pytest.mark.parametrize("count", [1, 6, 500])
def test_the_search_in_float32_misses_none(case, count):
    rows, sample = neighbours(case)
    all_ = (rows.double()[:, None] - sample.double()).square().sum(dim=-1).sqrt()
    expected = all_.sort(dim=1).values[:, :count]
    found = semantic._nearest_by_float32(rows, sample, count)
    assert torch.allclose(found, expected, rtol=1e-14, atol=0)
    assert torch.equal(found[:7], semantic._nearest_by_float32(rows[:7], sample, count))


def test_where_float32_can_tell_it_is_not_asked_twice(monkeypatch):
    """And where it cannot, only of those rows."""
    asked = []
    search = semantic._nearest
    monkeypatch.setattr(
        semantic, "_nearest", lambda x, *a: (asked.append(len(x)), search(x, *a))[1]
    )
    for case, expected in (("plain", []), ("twins", []), ("far", [40]), ("tiny", [40])):
        asked.clear()
        semantic._nearest_by_float32(*neighbours(case), 6)
        assert asked == expected, case
    rows, sample = neighbours("plain")
    sample[:50], rows[3] = 5 + 1e-5 * sample[:50], 5
    asked.clear()
    semantic._nearest_by_float32(rows, sample, 6)
    assert asked == [1]


def test_only_products_of_float32_are_relied_on(monkeypatch):
    x = torch.randn(300, 8)
    distance = FeatureDistance("nearest")
    distance.fit([torch.randn(700, 8)], seed=0)
    assert semantic._rounds_to_float32(x)
    assert not semantic._rounds_to_float32(x.double())
    with torch.autocast("cpu"):
        assert not semantic._rounds_to_float32(x)
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        assert not semantic._rounds_to_float32(x)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert not semantic._rounds_to_float32(x)
    finally:
        matmul.fp32_precision = before
    by_float32 = distance(x)
    assert torch.equal(distance(x[:3]), by_float32[:3])  # few, and so in float64
    monkeypatch.setattr(semantic, "_nearest_by_float32", None)
    distance(x[:7])
    with pytest.raises(TypeError):
        distance(x[:8])
    monkeypatch.setattr(semantic, "_rounds_to_float32", lambda _: False)
    assert torch.equal(distance(x), by_float32)


def test_a_program_has_one_way():
    """What is exported cannot ask whether float32 was certain, nor how many rows there are."""
    distance = FeatureDistance("nearest")
    distance.fit([torch.randn(700, 8)], seed=0)
    x = torch.randn(30, 8)
    shapes = {"features": {0: torch.export.Dim("batch")}}
    program = torch.export.export(distance, (x,), dynamic_shapes=shapes).module()
    for rows in (x, x[:2], x.repeat(9, 1)):
        assert torch.allclose(program(rows), distance(rows), rtol=1e-6)
