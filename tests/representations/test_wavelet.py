import numpy as np
import pytest
import pywt
import torch

from diffad_fast.representations import WaveletRepresentation


@pytest.mark.parametrize("channels, level", [(1, 1), (3, 2), (1, 3)])
def test_standardised_coefficients_of_pywavelets(channels, level):
    torch.manual_seed(0)
    images = torch.rand(9, channels, 32, 48, dtype=torch.float64)
    representation = WaveletRepresentation(channels, level).double()
    representation.fit(images.split(4))
    x = representation.encode(images)
    assert x.shape == (9, channels * 4**level, 32 >> level, 48 >> level)
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x.mean(dim=(0, 2, 3)), 0, atol=1e-7)
    np.testing.assert_allclose(x.std(dim=(0, 2, 3), correction=0), 1, rtol=1e-6)
    torch.testing.assert_close(representation.decode(x), images)

    low = images.numpy()
    for _ in range(level):
        low = pywt.dwt2(low, "haar", mode="periodization")[0]
    ours = x[:, :channels] * representation.deviation[:channels, None, None]
    ours = ours + representation.mean[:channels, None, None]
    np.testing.assert_allclose(ours, low, rtol=1e-10)


def test_empty_sub_bands_are_not_blown_up():
    """Smooth images have nothing in their fine bands but rounding; it must stay small."""
    images = torch.rand(8, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    representation = WaveletRepresentation(1, 2)
    representation.fit([images])
    noisy = images + 1e-5 * torch.randn_like(images)
    assert representation.encode(noisy)[:, 4:].abs().max() < 0.1
