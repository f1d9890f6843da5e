"""nearest_distances against scikit-learn and sums written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.autograd import gradcheck

from diffad_fast import ops, use_backend
from diffad_fast.errors import BackendError


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def on_cpu(*arguments):
    with use_backend("cpu"):
        return ops.nearest_distances(*arguments)


SIZES = [  # rows, numbers in a row, rows of the sample, neighbours
    (1, 1, 1, 1),
    (1, 30, 1050, 6),
    (3, 2, 5, 5),
    (13, 17, 7, 3),
    (47, 16, 16, 1),
    (49, 33, 130, 20),
    (100, 5, 4096, 6),
    (12, 768, 400, 64),
    (2, 5000, 33, 4),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_distances_are_scikit_learns(backend, size):
    rows, d, samples, count = size
    x, sample = 3 * random(rows, d), random(samples, d, seed=1)
    found = ops.nearest_distances(x, sample, count)
    known = NearestNeighbors(n_neighbors=count, algorithm="kd_tree").fit(sample.double().numpy())
    expected = known.kneighbors(x.double().numpy())[0]
    assert found.dtype == torch.float64 and found.shape == (rows, count)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13)


def written_out(x: torch.Tensor, sample: torch.Tensor, count: int) -> torch.Tensor:
    squares = (x.double()[:, None] - sample.double()).square().sum(dim=-1)
    return squares.sqrt().sort(dim=1).values[:, :count]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_native_distances_are_exact(cpu_isa, size, dtype):
    rows, d, samples, count = size
    x, sample = 3 * random(rows, d, dtype=dtype), random(samples, d, dtype=dtype, seed=1)
    expected = written_out(x, sample, count)
    torch.testing.assert_close(on_cpu(x, sample, count), expected, rtol=1e-14, atol=0)


def neighbours(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """40 rows and a sample of 500, of a kind."""
    x = random(500 + 40, 24)
    if case == "far":  # |a|^2 is a million times more than any distance
        x += 1e3
    elif case == "twins":
        x = x[torch.arange(540) % 20]
    elif case == "alike":  # all of them but for the last digits
        x = 1 + 1e-6 * x
    elif case == "whole":  # many at the same distance
        x = (4 * x).round()
    elif case == "one shell":  # float32 cannot tell who is nearest
        x[:500] /= x[:500].norm(dim=1, keepdim=True)
        x[500:] = 0
    elif case == "tiny":  # beyond what squares of float32 hold
        x *= 1e-22
    elif case == "huge":
        x *= 1e22
    elif case == "mixed":
        x *= 10.0 ** torch.linspace(-25, 25, 540)[torch.randperm(540)][:, None]
    elif case == "outlier":
        x[0] *= 1e4
    elif case == "zero":
        x[:500] = 0
    return x[500:], x[:500]


CASES = ["plain", "far", "twins", "alike", "whole", "one shell", "tiny", "huge", "mixed", "outlier"]
CASES += ["zero"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 6, 64])
def test_none_is_missed(cpu_isa, case, count):
    x, sample = neighbours(case)
    expected = written_out(x, sample, count)
    torch.testing.assert_close(on_cpu(x, sample, count), expected, rtol=1e-14, atol=0)


def test_in_a_shell_float32_is_not_enough():
    """A search in float32 alone would give another neighbour there."""
    x, sample = neighbours("one shell")
    nearest = (x[:, None] - sample).square().sum(dim=-1).topk(6, largest=False).indices
    found = (sample.double()[nearest] - x.double()[:, None]).norm(dim=2).sort(dim=1).values
    assert (found > (1 + 1e-14) * written_out(x, sample, 6)).any(dim=1).all()


def test_what_is_not_finite(backend, cpu_isa):
    """Infinite distances follow finite ones, NaN both, and only the rows concerned have any."""
    x, sample = random(30, 7), random(200, 7, seed=1)
    expected = ops.nearest_distances(x, sample, 6)
    x[3, 2], x[4, 0], x[5] = float("nan"), float("inf"), -float("inf")
    found = ops.nearest_distances(x, sample, 6)
    assert found[3].isnan().all() and (found[4:6] == float("inf")).all()
    others = [i for i in range(30) if i not in (3, 4, 5)]
    torch.testing.assert_close(found[others], expected[others], rtol=1e-13, atol=0)


def test_a_sample_that_is_not_finite(cpu_isa):
    x, sample = random(5, 7), random(8, 7, seed=1)
    sample[1, 2], sample[4, 0], sample[7, 3] = float("nan"), float("inf"), float("inf")
    found = on_cpu(x, sample, 8)
    torch.testing.assert_close(found[:, :5], written_out(x, sample[[0, 2, 3, 5, 6]], 5))
    assert (found[:, 5:7] == float("inf")).all() and found[:, 7].isnan().all()


def test_a_row_is_for_itself(cpu_isa):
    """Bit for bit, wherever it stands and whoever stands beside it."""
    x, sample = random(150, 19), random(300, 19, seed=1)
    x[40:80] = sample[:40]
    found = on_cpu(x, sample, 5)
    assert (found[40:80, 0] == 0).all() and (found[:40, 0] > 0).all()
    for count in (1, 5, 13, 47, 49):
        for begin in (0, 44, 150 - count):
            some = on_cpu(x[begin : begin + count], sample, 5)
            assert torch.equal(some, found[begin : begin + count])


def test_strided(backend, written):
    x, sample = random(9, 4 * 11)[::2, ::4], random(2 * 11, 60, seed=1).T[:, 1::2]
    found = ops.nearest_distances(x, sample, 3)
    torch.testing.assert_close(found, written_out(x, sample, 3), rtol=1e-12, atol=0)
    assert written(found)
    # Rows apart, of both; one row many times.
    x, sample = random(9, 40)[:, 3:14], random(60, 50, seed=1)[::2, 5:16]
    for rows in (x, x[:1].expand(50, -1)):
        found = ops.nearest_distances(rows, sample, 3)
        torch.testing.assert_close(found, written_out(rows, sample, 3), rtol=1e-12, atol=0)
    assert ops.nearest_distances(x[:0], sample, 3).shape == (0, 3)


@pytest.mark.native
def test_what_the_kernel_leaves_to_the_reference():
    x, sample = random(4, 3, dtype=torch.float64), random(80, 3, dtype=torch.float64, seed=1)
    many = ops.nearest_distances(x, sample, 70)
    torch.testing.assert_close(many, written_out(x, sample, 70), rtol=1e-12, atol=0)
    with use_backend("cpu"), pytest.raises(BackendError, match="up to 64 neighbours, not 70"):
        ops.nearest_distances(x, sample, 70)
    x.requires_grad_()
    assert gradcheck(lambda x: ops.nearest_distances(x, sample, 3), (x,))
    ops.nearest_distances(x, x.detach(), 1).sum().backward()
    assert (x.grad == 0).all()
    with use_backend("cpu"), pytest.raises(BackendError, match="it has no gradients"):
        ops.nearest_distances(x, sample, 3)


@pytest.mark.native
def test_the_operator_is_registered_in_full():
    x, sample = random(5, 3), random(9, 3, seed=1)
    torch.library.opcheck(torch.ops.diffad_fast.nearest_distances.default, (x, sample, 4))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": random(3)}, ValueError, "x must have 2 dimensions"),
        ({"sample": random(9, 4)}, ValueError, r"sample must have shape \(9, 3\), got \(9, 4\)"),
        ({"sample": random(9, 3).double()}, TypeError, "sample is torch.float64 and x torch.float"),
        ({"count": 0}, ValueError, r"count must be in \[1, 9\], got 0"),
        ({"count": 10}, ValueError, r"count must be in \[1, 9\], got 10"),
        ({"count": 2.0}, TypeError, "count must be an integer, got 2.0"),
        ({"x": random(2, 0), "sample": random(9, 0)}, ValueError, "x has no columns"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"x": random(2, 3), "sample": random(9, 3), "count": 4, **change}
    with pytest.raises(error, match=message):
        ops.nearest_distances(**arguments)
