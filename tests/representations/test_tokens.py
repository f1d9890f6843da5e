import math

import numpy as np
import pytest
import pywt
import torch
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA

from diffad_fast.config import DetectorConfig
from diffad_fast.errors import InputError
from diffad_fast.representations import Preprocessing, VectorTokens, create_tokens
from diffad_fast.representations.tokens import SMALLEST_ENERGY, haar_patches, sub_band_energies
from diffad_fast.representations.whitening import Moments, Whitening


def test_whitening_is_that_of_scikit_learn():
    rows = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    moments, whitening = Moments(), Whitening()
    for part in rows.split([100, 1, 399]):
        moments.add(part)
    whitening.fit(moments)
    assert torch.allclose(moments.covariance, torch.cov(rows.T, correction=0), atol=1e-12)
    expected = PCA(whiten=True).fit_transform(rows.numpy())[:, ::-1]
    found = whitening(rows.float()).numpy() * (499 / 500) ** 0.5
    assert np.abs(np.abs(found) - np.abs(expected)).max() < 1e-4  # a direction's sign is free


def test_small_eigenvalues_are_not_blown_up():
    rows = torch.randn(2000, 2, dtype=torch.float64) * torch.tensor([1.0, 1e-6])
    moments, whitening = Moments(), Whitening()
    moments.add(rows)
    whitening.fit(moments)
    deviation = whitening(rows.float()).std(dim=0)
    assert deviation[1] == pytest.approx(1, abs=0.01) and deviation[0] < 1e-4


def test_energies_are_those_of_pywavelets():
    x = torch.rand(2, 1, 32, 16)
    found = sub_band_energies(x, 8)
    assert found.shape == (2, 10, 4, 2)
    low, expected = x[:, 0].numpy().astype(np.float64), []
    for level in (1, 2, 3):
        low, bands = pywt.dwt2(low, "haar")
        for band in bands:
            side = 8 >> level
            cells = band.reshape(2, 4, side, 2, side)
            expected.append(np.log((cells**2).mean(axis=(2, 4)) + SMALLEST_ENERGY))
    expected.append(low / 8)
    assert np.abs(found.numpy() - np.stack(expected, axis=1)).max() < 2e-5


def test_patches_keep_everything():
    x = torch.rand(2, 3, 16, 16)
    patches = haar_patches(x, 4)
    assert patches.shape == (2, 48, 4, 4)
    assert torch.allclose(patches.square().sum(), x.square().sum())


def test_preprocessing():
    x = torch.rand(3, 1, 40, 28)
    found = Preprocessing("log", 3.0, True)(x)
    logarithm = np.log(x[:, 0].double().numpy() + 0.05)
    flat = np.stack([i - gaussian_filter(i, 3.0, mode="reflect", truncate=4) for i in logarithm])
    expected = flat / flat.std(axis=(1, 2), keepdims=True)
    assert np.abs(found[:, 0].numpy() - expected).max() < 1e-5
    assert torch.equal(Preprocessing("linear", 0.0, False)(x), x)


@pytest.mark.parametrize("multiplies", [True, False])
def test_intensity_follows_what_light_does(multiplies):
    texture = 0.1 * torch.rand(20, 1, 64, 64)
    light = torch.linspace(0.1, 0.8, 20)[:, None, None, None]
    images = light * (1 + texture) if multiplies else light + texture
    step = Preprocessing("auto", 0.0, False)
    step.fit(images.split(7))
    assert bool(step.log) == multiplies


def test_a_token_is_a_cell_and_its_neighbours():
    (tokens,) = create_tokens(
        DetectorConfig.create(denoiser="token-mlp", image_size=64, tokens=["energy-16"])
    )
    images = torch.rand(6, 1, 64, 64)
    tokens.fit(lambda: iter(images.split(4)))
    encoded = tokens.encode(images)
    assert encoded.shape == (6, 4, 4, 9 * 13) and tokens.dim == 9 * 13
    rows = encoded.flatten(0, 2)
    # As many directions as tokens allow have the variance 1, none has more.
    assert rows.std(dim=0, correction=0).max() == pytest.approx(1, abs=1e-2)
    changed = images.clone()
    changed[:, :, 20:24, 20:24] = 1 - changed[:, :, 20:24, 20:24]
    tokens.preprocessing.illumination, tokens.preprocessing.scale = 0.0, False
    moved = (tokens.encode(changed) - tokens.encode(images)).abs().amax(dim=(0, 3)) > 1e-4
    assert moved[:3, :3].all() and not moved[3].any() and not moved[:, 3].any()


def test_vectors_by_feature_and_by_one_scale():
    rows = torch.randn(400, 3) * torch.tensor([1.0, 10.0, 0.0]) + 5
    for scale, expected in (
        ("feature", [1.0, 1.0]),
        ("global", [1 / math.sqrt(101 / 3), 10 / math.sqrt(101 / 3)]),
        ("auto", [1.0, 1.0]),
    ):
        tokens = VectorTokens(scale)
        tokens.fit(lambda: iter(rows.split(90)))
        encoded = tokens.encode(rows)
        assert encoded.shape == (400, 1, 1, 3)
        found = encoded[:, 0, 0].std(dim=0, correction=0)
        assert found[:2].tolist() == pytest.approx(expected, rel=0.1) and found[2] < 1e-5
        assert encoded.mean(dim=(0, 1, 2)).abs().max() < 1e-5
    wide = VectorTokens("auto")
    wide.fit(lambda: iter([torch.randn(50, 256)]))
    assert len(set(wide.deviation.tolist())) == 1


def test_features_need_a_backbone():
    with pytest.raises(InputError, match="pass features=module"):
        create_tokens(DetectorConfig.create(denoiser="token-mlp", tokens=["features"]))
