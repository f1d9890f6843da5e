"""The Triton anomaly_map against the reference in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import diffad_fast as daf
from diffad_fast import ops, reference
from diffad_fast.errors import BackendError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEATURES = ((3, 5, 7), (70, 3, 2), (2, 1, 1), (4, 19, 11))


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def features(count, n, seed, dtype=torch.float32):
    return tuple(random(n, *FEATURES[i], seed=seed + i, dtype=dtype) for i in range(count))


def widened(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(map(widened, value)) if isinstance(value, (tuple, list)) else value


def check(x, x_hat, f=(), f_hat=(), tolerance=2e-6, **options):
    with daf.use_backend("triton"):
        got = ops.anomaly_map(x, x_hat, f, f_hat, **options)
    expected = reference.anomaly_map(
        *map(widened, (x, x_hat, f, f_hat)), **{k: widened(v) for k, v in options.items()}
    )
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1)
        assert float(error) < tolerance
    return got


@pytest.mark.parametrize("levels", range(5))
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_sub_bands(channels, levels):
    shape = (2, channels, *((48, 80) if levels > 3 else (24, 8 * 17)))
    check(random(*shape), random(*shape, seed=1), levels=levels, sigma=0.0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 13, 11), (2, 3, 1, 139), (1, 1, 19, 1)])
def test_odd_sizes(shape):
    f, f_hat = features(2, shape[0], 2), features(2, shape[0], 9)
    check(random(*shape), random(*shape, seed=1), f, f_hat, sigma=1.0, top=0.1)


@pytest.mark.parametrize("shape", [(2, 1, 24, 136), (1, 2, 13, 11)])
def test_base(shape):
    n, _, height, width = shape
    base = random(n, width, height, seed=2).transpose(1, 2)
    weights = (0.0, 0.0, 0.0) if shape[1] == 1 else (1.0, 1.0, 1.0)
    x, x_hat = random(*shape), random(*shape, seed=1)
    check(x, x_hat, weights=weights, sigma=1.0, base=base)


@pytest.mark.parametrize("count", range(5))
def test_features(count):
    x, x_hat = random(2, 1, 11, 37), random(2, 1, 11, 37, seed=1)
    weights = (0.5, 2.0, 1.0)
    check(x, x_hat, features(count, 2, 3), features(count, 2, 8), weights=weights, sigma=0.0)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 4.0, 9.3])
def test_gaussian(sigma):
    check(random(1, 1, 67, 70), random(1, 1, 67, 70, seed=1), sigma=sigma)
    check(random(2, 1, 3, 5), random(2, 1, 3, 5, seed=1), sigma=sigma)


@pytest.mark.parametrize(
    "weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -2.0), (0.0,) * 3]
)
@pytest.mark.parametrize("kind", ["numbers", "scalars", "maps"])
def test_statistics(weights, kind):
    """Weights that leave maps out, whose statistics may be missing."""
    x, x_hat = random(2, 2, 10, 14), random(2, 2, 10, 14, seed=1)
    make = {
        "numbers": lambda i: (0.3, 1.7), "scalars": lambda i: (random(), random().abs() + 1),
        "maps": lambda i: (random(10, 14, seed=i), random(1, 14, seed=i).abs() + 0.5),
    }[kind]  # fmt: skip
    stats = tuple(make(i) if w else None for i, w in enumerate(weights))
    check(x, x_hat, features(2, 2, 3), features(2, 2, 8), weights=weights, levels=1, stats=stats,
          sigma=0.5)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_views(dtype):
    x = random(2, 6, 12, 20, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x_hat = random(2, 6, 12, 20, seed=1, dtype=dtype)
    f = random(2, 80, 9, 7, seed=2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    f_hat = random(2, 80, 9, 7, seed=3, dtype=dtype)
    statistics = tuple((random(12, 20, seed=i), random(12, 20, seed=i).abs() + 1) for i in range(3))
    check(x, x_hat, (f,), (f_hat,), levels=2, stats=statistics)
    check(x[:, 1:4, 4:, ::2], x_hat[:, ::2, :8, :10], (f[:, :70:2],), (f_hat[:, 45:],), levels=1)
    check(x, x_hat[:, :1].expand(2, 6, 12, 20), (f,), (f_hat,), levels=1)


def test_identical_inputs_and_zero_features():
    x, f = random(1, 2, 8, 8), torch.zeros(1, 3, 4, 4, device=DEVICE)
    check(x, x, (f, f), (f, f), levels=1, weights=(1.0, 0.0, 1.0))
    check(x, x, (f,), (f,))


def test_empty_batch():
    x = random(0, 2, 8, 8)
    with daf.use_backend("triton"):
        result, score = ops.anomaly_map(x, x)
    assert result.shape == (0, 8, 8) and score.shape == (0,)


def test_an_image_does_not_depend_on_its_neighbours():
    x, x_hat = random(3, 1, 16, 24), random(3, 1, 16, 24, seed=1)
    with daf.use_backend("triton"):
        together = ops.anomaly_map(x, x_hat, levels=2)
        alone = ops.anomaly_map(x[1:2], x_hat[1:2], levels=2)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": random(1, 1, 8, 8).double()}, "float64"),
        ({"x": random(1, 1, 8, 8).requires_grad_()}, "no gradient"),
        ({"stats": ((random(8).requires_grad_(), 1.0), None, None)}, "no gradient"),
        ({"features": (random(1, 1, 2, 2),) * 5, "features_hat": (random(1, 1, 2, 2),) * 5},
         "4 feature maps"),
        ({"x": random(1, 1, 32, 32), "x_hat": random(1, 1, 32, 32), "levels": 5}, "4 levels"),
    ],
)  # fmt: skip
def test_refused_calls_raise_by_name(change, message):
    given = {"x": random(1, 1, 8, 8), "x_hat": random(1, 1, 8, 8)} | change
    with daf.use_backend("triton"), pytest.raises(BackendError, match=message):
        ops.anomaly_map(**given)
    if DEVICE == "cuda":
        ops.anomaly_map(**given)  # auto takes the reference


def test_opcheck():
    x, x_hat = random(1, 1, 4, 4), random(1, 1, 4, 4, seed=1)
    f, f_hat = list(features(1, 1, 2)), list(features(1, 1, 7))
    statistics = [random(), random(4, 4), random()]
    namespace = torch.ops.diffad_fast_triton
    torch.library.opcheck(
        namespace.weighted_map,
        (x, x_hat, f, f_hat, [1.0, 2.0, 3.0], 1, True, statistics, statistics, None),
    )
    torch.library.opcheck(namespace.blurred_map, (random(1, 4, 4), 1.0))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_on_a_gpu():
    x, x_hat = random(4, 3, 256, 256), random(4, 3, 256, 256, seed=1)
    f, f_hat = random(4, 64, 32, 32, seed=2), random(4, 64, 32, 32, seed=3)

    def function(x, x_hat):
        return ops.anomaly_map(x, x_hat, (f,), (f_hat,), levels=3)

    first = check(x, x_hat, (f,), (f_hat,), levels=3)
    with daf.use_backend("triton"):
        for again in (function(x, x_hat), torch.compile(function, fullgraph=True)(x, x_hat)):
            assert torch.equal(again[0], first[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = function(x, x_hat)
        captured[0].zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
