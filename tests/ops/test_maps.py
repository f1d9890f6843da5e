"""anomaly_map against NumPy, SciPy and PyWavelets."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_fast import ops, reference, use_backend
from diffad_fast.errors import BackendError


def random(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def pixel_map(x, y):
    return np.abs(x - y).mean(axis=1)


def subband_map(x, y, levels):
    total = 0.0
    a, b = (pywt.wavedec2(image, "haar", "periodization", levels) for image in (x, y))
    bands = [(levels, a[0], b[0])]
    for level, (p, q) in enumerate(zip(a[1:], b[1:], strict=True)):
        bands += [(levels - level, band, other) for band, other in zip(p, q, strict=True)]
    for level, band, other in bands:
        difference = np.abs(band - other).mean(axis=1)
        total = total + np.kron(difference, np.ones((1, 2**level, 2**level)))
    return total


def bilinear(image, size):
    """Pixel centres at (i + 1/2) / n, positions beyond the outermost centres at those."""
    for axis, n in enumerate(size):
        count = image.shape[axis]
        position = np.clip((np.arange(n) + 0.5) * count / n - 0.5, 0, count - 1)
        low = np.minimum(position.astype(int), max(count - 2, 0))
        high = np.minimum(low + 1, count - 1)
        share = np.expand_dims(position - low, 1 - axis)
        image = image.take(low, axis) * (1 - share) + image.take(high, axis) * share
    return image


def feature_map(features, features_hat, size):
    total = 0.0
    for f, g in zip(features, features_hat, strict=True):
        norms = np.linalg.norm(f, axis=1) * np.linalg.norm(g, axis=1)
        distance = 1 - (f * g).sum(axis=1) / norms
        total = total + np.stack([bilinear(image, size) for image in distance])
    return total


def smooth(maps, sigma):
    return np.stack([scipy.ndimage.gaussian_filter(m, sigma, mode="reflect") for m in maps])


def test_all_maps_together():
    x, y = random((2, 3, 16, 24), 0), random((2, 3, 16, 24), 1)
    f = [random((2, 4, 8, 12), 2), random((2, 6, 5, 3), 3), random((2, 2, 1, 1), 4)]
    g = [random((2, 4, 8, 12), 5), random((2, 6, 5, 3), 6), random((2, 2, 1, 1), 7)]
    stats = [
        (random((16, 24), 8), random((16, 24), 9).abs() + 0.5),
        (0.3, torch.tensor(2.0, dtype=torch.float64)),
        (random((1, 24), 10), 0.7),
    ]
    weights = (0.5, 2.0, 1.5)
    got, score = ops.anomaly_map(x, y, f, g, weights, 3, stats, sigma=1.3, top=0.05)

    maps = [
        pixel_map(x.numpy(), y.numpy()),
        feature_map([a.numpy() for a in f], [a.numpy() for a in g], (16, 24)),
        subband_map(x.numpy(), y.numpy(), 3),
    ]
    total = sum(
        w * (m - np.asarray(mean)) / np.asarray(deviation)
        for w, m, (mean, deviation) in zip(weights, maps, stats, strict=True)
    )
    expected = smooth(total, 1.3)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)
    top = np.sort(expected.reshape(2, -1), axis=1)[:, -19:]  # round(0.05 * 384)
    np.testing.assert_allclose(score.numpy(), top.mean(axis=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [0, 1, 2, 4])
def test_subbands(levels):
    x, y = random((2, 2, 16, 32), 0), random((2, 2, 16, 32), 1)
    got, _ = ops.anomaly_map(x, y, weights=(0.0, 1.0, 1.0), levels=levels, sigma=0.0)
    expected = subband_map(x.numpy(), y.numpy(), levels) if levels else np.zeros((2, 16, 32))
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-13)


def test_features_alone():
    x = random((2, 1, 9, 7), 0)
    f, g = random((2, 5, 4, 3), 1), random((2, 5, 4, 3), 2)
    got, _ = ops.anomaly_map(x, x, [f], [g], sigma=0.0)
    expected = feature_map([f.numpy()], [g.numpy()], (9, 7))
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-13)
    nothing, _ = ops.anomaly_map(x, x, [f], [3 * f], sigma=0.0)  # the cosine ignores length
    assert nothing.abs().max() < 1e-14


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.05, 9.0), st.integers(0, 2**31))
def test_smoothing_is_scipys(height, width, sigma, seed):
    """Also where the kernel is many times larger than the image."""
    x = random((2, 1, height, width), seed)
    got, _ = ops.anomaly_map(x, torch.zeros_like(x), sigma=sigma)
    expected = smooth(np.abs(x[:, 0].numpy()), sigma)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("top, count", [(0.0, 1), (0.001, 1), (0.03, 4), (0.5, 60), (1.0, 120)])
def test_score(top, count):
    x = random((3, 2, 10, 12), 0)
    maps, score = ops.anomaly_map(x, torch.zeros_like(x), sigma=0.0, top=top)
    largest = np.sort(maps.numpy().reshape(3, -1), axis=1)[:, -count:]
    np.testing.assert_allclose(score.numpy(), largest.mean(axis=1), rtol=0, atol=1e-14)


def test_a_map_without_weight_is_left_out_even_if_it_is_not_finite():
    x, y = random((1, 1, 4, 4), 0), random((1, 1, 4, 4), 1)
    f = torch.full((1, 2, 2, 2), torch.nan)
    stats = ((0.5, 2.0), None, None)
    got, _ = ops.anomaly_map(x, y, [f], [f], (1.0, 0.0, 0.0), 1, stats, 0.0)
    expected = (pixel_map(x.numpy(), y.numpy()) - 0.5) / 2
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-14)


def test_neighbours_in_the_batch_do_not_matter():
    x, y = random((4, 1, 16, 16), 0, torch.float32), random((4, 1, 16, 16), 1, torch.float32)
    maps, scores = ops.anomaly_map(x, y, levels=2)
    for i in range(4):
        alone = ops.anomaly_map(x[i : i + 1], y[i : i + 1], levels=2)
        torch.testing.assert_close(alone[0][0], maps[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone[1][0], scores[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype):
    x, y = random((2, 2, 16, 8), 0, dtype), random((2, 2, 16, 8), 1, dtype)
    f, g = random((2, 4, 4, 2), 2, dtype), random((2, 4, 4, 2), 3, dtype)
    got = ops.anomaly_map(x, y, [f], [g], levels=1)
    wide = ops.anomaly_map(x.double(), y.double(), [f.double()], [g.double()], levels=1)
    for a, b in zip(got, wide, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradients():
    inputs = [random(s, i).requires_grad_() for i, s in
              enumerate([(1, 2, 4, 8), (1, 2, 4, 8), (1, 3, 2, 2), (1, 3, 2, 2)])]  # fmt: skip
    assert torch.autograd.gradcheck(
        lambda x, y, f, g: ops.anomaly_map(x, y, [f], [g], levels=2, sigma=0.8, top=0.1),
        inputs,
        fast_mode=True,
    )


X = torch.zeros(2, 1, 12, 8)
FEATURE = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": X[0]}, ValueError, "x must have 4 dimensions"),
        ({"x": X.byte()}, TypeError, "x must be float32.*torch.uint8"),
        ({"x": X[..., :0]}, ValueError, "no pixels"),
        ({"x_hat": X[:1]}, ValueError, r"x_hat must have shape \(2, 1, 12, 8\)"),
        ({"features": [FEATURE]}, ValueError, "1 features but 0 features_hat"),
        (
            {"features": [FEATURE[:1]], "features_hat": [FEATURE[:1]]},
            ValueError,
            r"features\[0\] has 1 samples",
        ),
        (
            {"features": [FEATURE[..., :0]], "features_hat": [FEATURE[..., :0]]},
            ValueError,
            r"features\[0\] is empty",
        ),
        (
            {"features": [FEATURE], "features_hat": [FEATURE[:, :2]]},
            ValueError,
            r"features_hat\[0\] must have shape",
        ),
        ({"weights": (1.0, 2.0)}, ValueError, "weights must be three"),
        ({"weights": (1.0, 2.0, "a")}, TypeError, "sub-band map's weight must be a number"),
        ({"levels": 3}, ValueError, "divisible by 8 for levels = 3, got 12x8"),
        ({"levels": -1}, ValueError, "levels must be in"),
        ({"sigma": -1.0}, ValueError, "sigma must be in"),
        ({"top": 2.0}, ValueError, "top must be in"),
        ({"base": torch.zeros(2, 1, 12, 8)}, ValueError, r"base must have shape \(2, 12, 8\)"),
        ({"base": torch.zeros(2, 12, 8).int()}, TypeError, "base must be float32"),
        ({"stats": [None] * 3}, ValueError, "None for the pixel map"),
        ({"stats": [(0.0, 1.0)] * 2}, ValueError, "stats must be three"),
        ({"stats": [(0.0,)] * 3}, ValueError, "must be .mean, deviation."),
        ({"stats": [(torch.zeros(8, 12), 1.0)] * 3}, ValueError, r"\(8, 12\).*broadcast"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.anomaly_map(**{"x": X, "x_hat": X, **change})


# ---------------------------------------------------------------------- the native operator


def inputs(size, scales, dtype=torch.float64, layout=torch.contiguous_format, feature_dtype=None):
    """x, x_hat and pairs of features; ``scales`` are (channels, height, width)."""
    n = size[0]

    def make(shape, seed, dtype):
        return random(shape, seed, dtype).contiguous(memory_format=layout)

    x, y = (make(size, seed, dtype) for seed in (0, 1))
    f, g = (
        [make((n, *scale), 10 * k + i, feature_dtype or dtype) for i, scale in enumerate(scales)]
        for k in (1, 2)
    )
    return x, y, f, g


def wide(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(map(wide, value)) if isinstance(value, (list, tuple)) else value


def agree(*args, tolerance=1e-5, **options):
    """The native operator equals the reference in float64; returns its map and score."""
    with use_backend("cpu"):
        got = ops.anomaly_map(*args, **options)
    exact = reference.anomaly_map(*wide(args), **{k: wide(v) for k, v in options.items()})
    for a, b in zip(got, exact, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        scale = 1 + b.abs().max() if b.numel() else 1
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * float(scale))
    return got


GRID = [
    # size, scales, levels, sigma
    ((2, 3, 32, 48), [(8, 8, 12), (5, 5, 7), (33, 4, 6)], 3, 4.0),
    ((3, 1, 16, 16), [(64, 4, 4)], 4, 2.0),
    ((1, 2, 13, 37), [(3, 13, 37), (1, 40, 90)], 0, 1.5),
    ((2, 2, 2, 70), [(17, 1, 1), (16, 3, 2)], 1, 0.7),
    ((1, 1, 1, 1), [(2, 1, 1)], 0, 3.0),
    ((2, 1, 1, 67), [(4, 1, 9)], 0, 30.0),
    ((1, 1, 67, 1), [(4, 9, 1)], 0, 0.0),
    ((0, 2, 8, 8), [(4, 2, 2)], 1, 1.0),
    ((2, 4, 8, 520), [(24, 2, 130)], 2, 0.1),
]


@pytest.mark.native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_native_equals_reference(cpu_isa, dtype, layout):
    for size, scales, levels, sigma in GRID:
        x, y, f, g = inputs(size, scales, dtype, layout)
        compute = torch.promote_types(dtype, torch.float32)
        height, width = size[2:]
        stats = [
            (random((height, width), 3, compute), random((height, width), 4, compute).exp()),
            (0.3, torch.tensor(2.0)),
            (random((width,), 5, compute), random((height, 1), 6, torch.float64).exp()),
        ]
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        for some in (None, stats):
            got = agree(x, y, f, g, (0.5, 2.0, 1.5), levels, some, sigma, tolerance=tolerance)
            assert got[0].dtype == got[1].dtype == compute


@pytest.mark.native
@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (-1, 2.5, 0)])
def test_native_leaves_out_what_has_no_weight(weights):
    x, y, f, g = inputs((2, 3, 16, 24), [(8, 4, 6)], torch.float32)
    if not weights[1]:
        f[0].fill_(torch.nan)
    if not weights[0] and not weights[2]:
        x.fill_(torch.nan)
    used = [entry if w else None for w, entry in zip(weights, [(0.1, 2.0)] * 3, strict=True)]
    got, _ = agree(x, y, f, g, weights, 2, used, 1.0)
    assert got.isfinite().all()


@pytest.mark.native
def test_native_reads_any_strides(cpu_isa):
    x, y, f, g = inputs((2, 3, 20, 36), [(6, 10, 18), (8, 5, 9)], torch.float32)
    want = agree(x, y, f, g, levels=2)

    def check(change):
        got = agree(change(x), change(y), [change(a) for a in f], g, levels=2)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    check(lambda a: a.transpose(2, 3).contiguous().transpose(2, 3))
    check(lambda a: a.repeat_interleave(2, 3)[..., ::2])
    check(lambda a: torch.nn.functional.pad(a, (3, 2, 1, 1))[:, :, 1:-1, 3:-2])
    check(lambda a: a.contiguous(memory_format=torch.channels_last))
    channels_last = torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 2)).contiguous(
        memory_format=torch.channels_last
    )
    agree(channels_last[:, 1:4], y, [f[0]], [g[0].contiguous(memory_format=torch.channels_last)])
    # Columns that were rows: the stride of an axis of one entry may be any number.
    columns = [
        (a.contiguous(memory_format=layout).transpose(2, 3), b.contiguous().transpose(2, 3))
        for a, b in [(f[0][:, :, :1], g[0][:, :, :1])]
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    for pair in (*columns, columns[1][::-1], (columns[1][0], columns[1][0].flip(2))):
        agree(x, y, [pair[0]], [pair[1]])
    x, y, f = x[:1].expand(2, 3, 20, 36), y[:, :1].expand(2, 3, 20, 36), f[1][:1]
    agree(x, y, [f.expand(2, -1, -1, -1)], [g[1]], levels=1)


@pytest.mark.native
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_native_mixes_dtypes(dtype, other):
    x, y, f, g = inputs((2, 2, 8, 16), [(8, 4, 4), (8, 2, 2)], dtype, feature_dtype=other)
    agree(x, y.to(other), f, [g[0].to(torch.float32), g[1]], levels=1)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_score_selects_exactly(cpu_isa, dtype):
    maps = [
        random((1, 1, 40, 50), 0, dtype) ** 8,
        torch.arange(2000).remainder(7).reshape(1, 1, 40, 50).to(dtype),
        torch.zeros(1, 1, 40, 50, dtype=dtype),
        10.0 ** random((1, 1, 40, 50), 1, dtype).mul(8).clamp(-30, 30),
    ]
    x = torch.cat(maps)
    for sign in (1.0, -1.0):
        for top in (0.0, 0.0005, 0.01, 0.5, 1.0):
            with use_backend("cpu"):
                got, score = ops.anomaly_map(
                    x, torch.zeros_like(x), weights=(sign, 0, 0), sigma=0.0, top=top
                )
            assert torch.equal(got, sign * x[:, 0].abs())
            count = max(1, round(top * 2000))
            want = got.double().flatten(1).sort(dim=1).values[:, -count:].mean(dim=1)
            torch.testing.assert_close(score.double(), want, rtol=2e-7, atol=0)
    for bad, want in ((torch.nan, torch.nan), (-torch.nan, torch.nan), (torch.inf, torch.inf)):
        x = maps[0].clone()
        x[0, 0, 3, 4] = bad
        with use_backend("cpu"):
            score = ops.anomaly_map(x, torch.zeros_like(x), sigma=0.0)[1]
        torch.testing.assert_close(score, torch.full((1,), want, dtype=dtype), equal_nan=True)


@pytest.mark.native
def test_native_writes_everything_and_does_not_depend_on_threads(by_threads, written):
    # More samples than go through the stages together, so that the last group is smaller.
    x, y, f, g = inputs((5, 1, 384, 400), [(9, 24, 25), (4, 100, 100)], torch.float32)
    whole = by_threads(lambda: agree(x, y, f, g, levels=3, tolerance=2e-5))
    assert all(map(written, whole))
    alone = agree(
        x[3:4], y[3:4], [a[3:4] for a in f], [a[3:4] for a in g], levels=3, tolerance=2e-5
    )
    assert torch.equal(alone[0][0], whole[0][3])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.native)])
def test_base_is_added_before_the_smoothing(backend):
    x, y = random((2, 2, 12, 20), 0), random((2, 2, 12, 20), 1)
    base = random((2, 20, 12), 2).transpose(1, 2)
    with use_backend(backend):
        got, score = ops.anomaly_map(x, y, weights=(0.5, 0.0, 0.0), sigma=1.2, top=0.1, base=base)
        alone, _ = ops.anomaly_map(x, y, weights=(0.0, 0.0, 0.0), sigma=0.0, base=base)
        narrow, _ = ops.anomaly_map(x.float(), y.float(), sigma=1.0, base=base.bfloat16())
        wide = ops.anomaly_map(x.float(), y.float(), sigma=1.0, base=base.bfloat16().float())
    expected = smooth(0.5 * pixel_map(x.numpy(), y.numpy()) + base.numpy(), 1.2)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)
    largest = np.sort(expected.reshape(2, -1), axis=1)[:, -24:]
    np.testing.assert_allclose(score.numpy(), largest.mean(axis=1), rtol=1e-12)
    assert torch.equal(alone, base)
    assert torch.equal(narrow, wide[0])


@pytest.mark.native
def test_native_compiles_and_passes_opcheck():
    x, y, f, g = inputs((2, 2, 16, 24), [(5, 4, 6)], torch.float32)
    stats = [(0.1, 2.0), (random((16, 24), 1, torch.float32), 1.0), None]

    def call(x, y, f, g):
        return ops.anomaly_map(x, y, [f], [g], (1.0, 1.0, 0.0), 2, stats)

    with use_backend("cpu"):
        want = call(x, y, *f, *g)
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(x, y, *f, *g)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    flat = [torch.zeros(16, 24), torch.ones(()).expand(16, 24)] * 3
    torch.library.opcheck(
        torch.ops.diffad_fast.anomaly_map.default,
        (x, y, f, g, [1.0, 1.0, 1.0], 2, flat, 1.0, 0.01, torch.ones(2, 16, 24)),
    )


@pytest.mark.native
def test_gradients_are_those_of_the_reference():
    x, y, f, g = inputs((1, 2, 8, 8), [(3, 4, 4)], torch.float32)
    grads = []
    for backend in ("cpu", "reference"):
        leaves = [a.clone().requires_grad_() for a in (x, y, f[0], g[0])]
        with use_backend(backend):
            maps, score = ops.anomaly_map(*leaves[:2], leaves[2:3], leaves[3:], levels=1)
        (maps.sum() + score.sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.native
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 40)),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 50)), max_size=3),
    st.integers(0, 3),
    st.floats(0.0, 6.0),
    st.floats(0.0, 1.0),
    st.booleans(),
)
def test_native_shapes(size, scales, levels, sigma, top, channels_last):
    n, c, h, w = size
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, y, f, g = inputs((n, c, h << levels, w << levels), scales, torch.float64, layout)
    agree(x, y, f, g, (1.0, 1.0, 1.0), levels, None, sigma, top, tolerance=1e-12)


@pytest.mark.native
def test_native_guards_its_memory():
    op = torch.ops.diffad_fast.anomaly_map
    x = torch.zeros(2, 1, 8, 8)
    f, ones = torch.zeros(2, 3, 4, 4), [1.0, 1.0, 1.0]
    good = [x, x, [f], [f], ones, 1, [], 1.0, 0.1]
    op(*good)
    for position, bad in [
        (0, x[0]), (1, x[..., :4]), (1, x.double()), (2, []), (2, [f[:1]]), (3, [f[:, :2]]),
        (2, [f.half()]), (2, [f[..., :0]]), (4, [1.0]), (5, 4), (5, -1), (6, [x[0, 0]]),
        (6, [x[0, 0, :4]] * 6), (6, [x[0, 0].double()] * 6), (7, -1.0), (7, float("nan")),
        (8, 2.0),
    ]:  # fmt: skip
        args = list(good)
        args[position] = bad
        with pytest.raises(RuntimeError, match="anomaly_map"):
            op(*args)
    both_double = [x, x, [f.double()], [f.double()], ones, 1, [], 1.0, 0.1]
    with pytest.raises(RuntimeError, match="differ in dtype"):
        op(*both_double)


# ------------------------------------------------------------------------- CUDA


def test_what_the_cuda_kernels_refuse(monkeypatch):
    operator = ops.dispatch.OPERATORS["anomaly_map"]
    monkeypatch.setitem(operator.implementations, "cuda", lambda *_: None)
    x = torch.zeros(1, 1, 32, 32)
    many = (x,) * 9
    for change, message in (
        ({}, None),
        ({"x": x.double()}, "float64"),
        ({"levels": 5}, "4 levels, not 5"),
        ({"levels": 5, "weights": (1.0, 1.0, 0.0)}, None),
        ({"features": many, "features_hat": many}, "8 feature maps, not 9"),
        ({"features": many, "features_hat": many, "weights": (1.0, 0.0, 1.0)}, None),
        ({"sigma": 11.1}, None),
        ({"sigma": 16.1}, None),
        ({"sigma": 16.2}, "up to 16 pixels here, not 16.2"),
        ({"sigma": 11.2, "capability": (8, 6)}, "up to 11 pixels here, not 11.2"),
    ):
        capability = change.pop("capability", (9, 0))
        given = {
            "x": x, "x_hat": x, "features": (), "features_hat": (), "weights": (1.0, 1.0, 1.0),
            "levels": 2, "stats": None, "sigma": 4.0, "top": 0.01, "base": None,
        } | change  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(ops.dispatch._choices[-1], "backend", "cuda")
            patch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
            if message is None:
                assert operator.backend("cuda", *given.values()) == "cuda"
            else:
                with pytest.raises(BackendError, match=message):
                    operator.backend("cuda", *given.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.3, 5.1, 11.0, 16.0])
@pytest.mark.parametrize("size", [(1, 1), (3, 130), (67, 70), (128, 128), (129, 128)])
def test_sizes_and_widths_on_cuda(cuda, size, sigma, dtype):
    """Images of one thread block for their largest values, the largest of these, and of two."""
    if sigma > ops.maps._largest_radius(torch.device(cuda)) / 4:
        pytest.skip("so wide a Gaussian needs the shared memory of a data centre's GPU")
    x, y = (random((2, 2, *size), seed, dtype).to(cuda) for seed in (1, 2))
    found = ops.anomaly_map(x, y, sigma=sigma, weights=(1.0, 0.0, 0.0), top=0.3)
    expected = reference.anomaly_map(
        x.double(), y.double(), sigma=sigma, weights=(1.0, 0.0, 0.0), top=0.3
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def moved(value, change):
    """Lists of tensors in lists, each tensor changed."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, change) for v in value)
    return change(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape, levels", [((2, 3, 16, 300), 0), ((2, 1, 6, 270), 1),
                                           ((1, 2, 8, 36), 2), ((3, 1, 24, 264), 3),
                                           ((1, 2, 32, 48), 4)])  # fmt: skip
def test_maps_on_cuda(cuda, shape, levels, layout):
    """Tiles beside each other and cut off, all levels, many and few channels of features."""
    scales = [(3, 5, 7), (40, 3, 2), (2, 1, 1), (17, 19, 11)]
    x, y, f, g = inputs(shape, scales, torch.float32, layout)
    n, _, height, width = shape
    base = random((n, height, width), 4, torch.float32)
    positions = [
        (random((height, width), i, torch.float32), random((height, width), i + 9).abs() + 0.5)
        for i in range(3)
    ]
    positions = [(mean, deviation.float()) for mean, deviation in positions]
    mixed = [(0.3, 1.7), positions[1], (positions[2][0][:, :1], 2.0)]
    for options in (
        ((1.0, 1.0, 1.0),),
        ((0.5, 2.0, -1.0), levels, positions, 1.0, 0.1, base),
        ((0.5, 2.0, -1.0), levels, mixed, 0.0),
        ((0.0, 1.0, 0.0), 0, [(0.3, 1.7)] * 3, 0.0),  # nothing of the pixels
    ):
        given = (x, y, tuple(f), tuple(g), *options)
        found = ops.anomaly_map(*moved(given, lambda t: t.to(cuda)))
        expected = reference.anomaly_map(*moved(given, torch.Tensor.double))
        for got, want in zip(found, expected, strict=True):
            scale = want.abs().max().clamp(min=1)
            assert float((got.cpu().double() - want).abs().max() / scale) < 2e-6


@pytest.mark.parametrize("top", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("change", ["none", "round", "same", "infinite", "nan"])
@pytest.mark.parametrize("height", [180, 80])
def test_scores_on_cuda(cuda, height, change, top):
    """Several thread blocks an image, and one; both signs, equal values, values that are no
    numbers."""
    base = random((2, height, 190), 3, torch.float32)
    if change == "round":
        base = base.round()
    if change == "same":
        base = torch.full_like(base, -3.0)
    if change in ("infinite", "nan"):  # of both signs
        base[0, 7, 9], base[1, 70, 3] = float(change[:3]), -float(change[:3])
    base = base.to(cuda)
    zeros = torch.zeros(2, 1, height, 190, device=cuda)
    weights = (0.0, 0.0, 0.0)
    _, score = ops.anomaly_map(zeros, zeros, weights=weights, sigma=0.0, top=top, base=base)
    count = max(1, round(top * height * 190))
    want = base.double().flatten(1).topk(count).values.mean(dim=1)
    torch.testing.assert_close(score.double(), want, rtol=2e-6, atol=2e-7, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", range(5))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu(layout, levels, dtype):
    """Against the reference in float64; bit for bit again, on another stream and in a graph."""
    x, y, f, g = inputs((3, 2, 80, 272), [(48, 20, 33), (64, 7, 5)], torch.float64, layout)
    given = [t.to("cuda", dtype) for t in (x, y, *f, *g)]
    position = random((80, 272), 5, torch.float32).cuda()
    stats = [(0.4, 1.5), (position, position.abs() + 0.5), (position[:, :1], 2.0)]
    base = random((3, 80, 272), 6, torch.float32).cuda()

    def call(x, y, f0, f1, g0, g1):
        return ops.anomaly_map(x, y, (f0, f1), (g0, g1), (1.0, 0.5, 2.0), levels, stats, base=base)

    with use_backend("cuda"):
        first = call(*given)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = call(*given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(*given)
        graph.replay()
    with use_backend("reference"):
        wide = [t.double() for t in given]
        want = ops.anomaly_map(
            *wide[:2], wide[2:4], wide[4:], (1.0, 0.5, 2.0), levels,
            [tuple(v.double() if isinstance(v, torch.Tensor) else v for v in s) for s in stats],
            base=base.double(),
        )  # fmt: skip
    for got, again, replayed, right in zip(first, aside, captured, want, strict=True):
        assert torch.equal(got, again) and torch.equal(got, replayed)
        assert float((got.double() - right).abs().max() / right.abs().max()) < 5e-6
