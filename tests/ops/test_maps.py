"""anomaly_map against NumPy, SciPy and PyWavelets."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_fast import ops


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
        lambda x, y, f, g: ops.anomaly_map(x, y, [f], [g], levels=2, sigma=0.8, top=0.1), inputs
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
        ({"stats": [None] * 3}, ValueError, "None for the pixel map"),
        ({"stats": [(0.0, 1.0)] * 2}, ValueError, "stats must be three"),
        ({"stats": [(0.0,)] * 3}, ValueError, "must be .mean, deviation."),
        ({"stats": [(torch.zeros(8, 12), 1.0)] * 3}, ValueError, r"\(8, 12\).*broadcast"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.anomaly_map(**{"x": X, "x_hat": X, **change})
