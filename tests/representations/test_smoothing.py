from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from diffad_fast.representations.smoothing import GaussianSmoothing, Upsampling


@pytest.mark.parametrize("sigma", [0.5, 0.7, 4.0, 30.0])
@pytest.mark.parametrize("shape", [(2, 3, 17, 32), (3, 8, 5), (1, 4)])
def test_smoothing_is_scipys(shape, sigma):
    """Also where the kernel is many times larger than the image; any number of leading axes."""
    x = torch.randn(shape, dtype=torch.float64)
    smoothed = GaussianSmoothing()
    widths = (0,) * (len(shape) - 2) + (sigma, sigma)
    expected = scipy.ndimage.gaussian_filter(x.numpy(), widths, mode="reflect")
    np.testing.assert_allclose(smoothed(x, sigma).numpy(), expected, rtol=0, atol=1e-13)


def test_each_deviation_and_dtype_has_its_own_matrices():
    x = torch.randn(1, 12, 12)
    smoothed = GaussianSmoothing()
    first = smoothed(x, 1.0)
    assert smoothed(x, 0) is x
    assert not torch.equal(smoothed(x, 2.0), first) and torch.equal(smoothed(x, 1.0), first)
    assert smoothed(x.double(), 1.0).dtype == torch.float64


@pytest.mark.parametrize("size", [(5, 8), (40, 64), (43, 27), (35, 8)])
def test_upsampling_is_pytorchs_and_scipys_elsewhere(size):
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(x[:, None], size, mode="bilinear")[:, 0]
    torch.testing.assert_close(Upsampling(0.0)(x, size), expected, rtol=0, atol=1e-14)
    places = [(np.arange(n) + 1) * cells / n - 0.5 for n, cells in zip(size, (5, 8), strict=True)]
    grid = np.meshgrid(*places, indexing="ij")
    moved = Upsampling(0.5)(x, size)
    for found, map_ in zip(moved.numpy(), x.numpy(), strict=True):
        expected = scipy.ndimage.map_coordinates(map_, grid, order=1, mode="nearest")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
