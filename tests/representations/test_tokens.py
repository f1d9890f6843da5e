import math

import numpy as np
import pytest
import pywt
import torch
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA

from diffad_fast.config import DetectorConfig, token_source
from diffad_fast.errors import InputError
from diffad_fast.representations import Preprocessing, VectorTokens, create_tokens
from diffad_fast.representations.moments import JointMoments
from diffad_fast.representations.tokens import BandEnergies, HaarPatches
from diffad_fast.representations.whitening import Whitening


def test_whitening_is_that_of_scikit_learn():
    rows = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    moments, whitening = JointMoments(), Whitening()
    for part in rows.split([100, 1, 399]):
        moments.add(part)
    whitening.fit(moments)
    assert torch.allclose(moments.covariance, torch.cov(rows.T, correction=0), atol=1e-12)
    expected = PCA(whiten=True).fit_transform(rows.numpy())[:, ::-1]
    found = whitening(rows.float()).numpy() * (499 / 500) ** 0.5
    assert np.abs(np.abs(found) - np.abs(expected)).max() < 1e-4  # a direction's sign is free


def test_small_eigenvalues_are_not_blown_up():
    rows = torch.randn(2000, 2, dtype=torch.float64) * torch.tensor([1.0, 1e-6])
    moments, whitening = JointMoments(), Whitening()
    moments.add(rows)
    whitening.fit(moments)
    deviation = whitening(rows.float()).std(dim=0)
    assert deviation[1] == pytest.approx(1, abs=0.01) and deviation[0] < 1e-4


def test_what_never_varies_counts_in_the_unit_of_what_does():
    rows = torch.randn(200, 7, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 0, 0, 0, 0])
    moments, whitening = JointMoments(), Whitening(standardise=True)
    moments.add(rows)
    whitening.fit(moments)
    away = rows.mean(dim=0)[None].float().repeat(2, 1)
    away[0, 1] += 0.2  # a tenth of a deviation of a number that varies
    away[1, 5] += 0.2
    found = whitening(away).norm(dim=1)
    assert found[0] == pytest.approx(0.1, rel=0.1)
    assert found[1] == pytest.approx(0.1 / 1e-3**0.5, rel=0.1)  # by the smallest eigenvalue


def test_energies_are_those_of_pywavelets():
    """The undecimated transform of PyWavelets, whose bands are circular: compared inside."""
    side = 128
    x = torch.rand(2, 1, side, side)
    energies = BandEnergies(side)
    assert (energies.cell, energies.levels) == (4, 3)
    found = energies(x).unflatten(1, (19, 1))[:, :, 0].numpy()
    assert found.shape == (2, 19, 32, 32)
    bands = pywt.swt2(x[:, 0].double().numpy(), "haar", level=3, norm=True, axes=(1, 2))
    row = 0
    for level, (_, details) in zip((1, 2, 3), reversed(bands), strict=True):
        for band in details:
            # Ours is centred on its pixel, theirs begins there.
            centred = np.roll(band, (2 ** (level - 1),) * 2, axis=(1, 2))
            cells = centred.reshape(2, 32, 4, 32, 4)
            inside = slice(4, -4)
            for offset, reduced in ((0, (cells**2).mean(axis=(2, 4))), (9, (cells**2).max((2, 4)))):
                error = found[:, row + offset, inside, inside] - reduced[:, inside, inside]
                assert np.abs(error).max() < 1e-6, (level, offset)
            row += 1
    mean = x[:, 0].reshape(2, 32, 4, 32, 4).mean(dim=(2, 4))
    assert np.abs(found[:, 18] - mean.numpy()).max() < 1e-6


def test_patches_keep_everything():
    x = torch.rand(2, 3, 16, 16)
    patches = HaarPatches(4)(x)
    assert patches.shape == (2, 48, 4, 4)
    assert torch.allclose(patches.square().sum(), x.square().sum())
    with pytest.raises(InputError, match="3 pixels wide"):
        HaarPatches(3)


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
    assert step.choices == {
        "intensity": "log" if multiplies else "linear", "illumination": 0.0, "image_scale": False,
    }  # fmt: skip


def test_preprocessing_is_chosen_without_augmentation():
    light = torch.linspace(0.1, 0.8, 20)[:, None, None, None]
    plain = light * (1 + 0.1 * torch.rand(20, 1, 64, 64))
    noisy = plain + 0.1 * torch.randn(plain.shape)
    config = DetectorConfig.create(image_size=64, tokens=["energy-8"])
    chosen = []
    for parts in ([plain], [plain, noisy, noisy]):
        step = Preprocessing("auto", None, None)
        step.fit(parts)
        tokens = create_tokens(config)
        tokens.fit(lambda parts=parts: iter(parts), lambda: iter([plain]))
        chosen.append((step.intensity, tokens.preprocessing.intensity))
    assert chosen == [("log", "log"), ("linear", "log")]


@pytest.mark.parametrize("lamp", [0.02, 0.2])
def test_illumination_is_what_normals_do_not_share(lamp):
    """An object's shading, the same in all, of deviation 0.1; a lamp that moves, of 0.02 or 0.2."""
    rows = torch.linspace(0, 2 * np.pi, 84)[:, None].expand(84, 84)
    phases = torch.rand(40, 1, 1, generator=torch.manual_seed(0)) * 2 * np.pi
    images = 0.5 + 2**0.5 * (0.1 * rows.sin() + lamp * (rows.T + phases).sin())[:, None]
    step = Preprocessing("linear", None, False)
    step.fit((images + 0.02 * torch.rand(images.shape)).split(7))
    assert step.illumination == (4.0 if lamp > 0.1 else 0.0)


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_images_are_scaled_where_contrast_is_a_whole_images(spread):
    """Logarithms of contrast differ by ``spread`` between images, by about 0.2 between places."""
    generator = torch.manual_seed(0)
    places = (0.2 * torch.randn(40, 1, 6, 6, generator=generator)).exp()
    places = places.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    whole = (spread * torch.randn(40, 1, 1, 1, generator=generator)).exp()
    images = 0.5 + 0.05 * whole * places * torch.randn(40, 1, 96, 96, generator=generator)
    step = Preprocessing("linear", 0.0, None)
    step.fit(images.split(7))
    assert step.scale == (spread > 0.2)


SOURCES = ["energy-16", "cell-8", "gradient-32", "spread-2", "mean-1", "patch-16"]


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
def test_every_source_has_its_grid(size):
    options = {"denoiser": "token-mlp", "tokens": SOURCES, "image_size": size}
    tokens = create_tokens(DetectorConfig.create(**options))
    images = torch.rand(12, 1, *size)
    tokens.fit(lambda: iter(images.split(5)))
    grids = tokens.encode(images)
    for (kind, grid), encoded in zip(map(token_source, SOURCES), grids, strict=True):
        expected = [round(grid * side / min(size)) for side in size]
        assert list(encoded.shape[:3]) == [12, *expected], kind
        rows = encoded.flatten(0, 2)
        assert rows.mean(dim=0).abs().max() < 1e-3
        # No direction has more than the variance 1.
        assert rows.std(dim=0, correction=0).max() == pytest.approx(1, abs=1e-2)
    # Two levels of bands, their mean squares and maxima, and the mean.
    features = 2 * 3 * 2 + 1
    assert tokens.dims == [9 * features, features, 2 * features, 2 * features, features, 16]


def test_where_a_spot_is_seen():
    options = {"denoiser": "token-mlp", "image_size": 64, "illumination": 0.0}
    options["tokens"] = ["energy-16", "cell-16", "spread-2"]
    tokens = create_tokens(DetectorConfig.create(**options))
    images = torch.rand(30, 1, 64, 64)
    tokens.fit(lambda: iter(images.split(7)))
    changed = images.clone()
    changed[:, :, 20:24, 20:24] = 0.0  # cell 5 of 16, the first of four quarters
    moved = [
        (a - b).abs().amax(dim=(0, 3)) > 1e-3
        for a, b in zip(tokens.encode(changed), tokens.encode(images), strict=True)
    ]
    assert moved[1][5, 5] and not moved[1][10:].any() and not moved[1][:, 10:].any()
    assert moved[0][3, 3] and moved[0][7, 7] and not moved[0][12:].any()
    assert moved[2].tolist() == [[True, False], [False, False]]


def test_normals_with_edges_in_known_places():
    """A line that every normal image has is no anomaly; where it is missing is one."""
    images = torch.rand(60, 1, 64, 64) * 0.2
    images[..., 30:34] += 0.7
    options = {"denoiser": "token-mlp", "image_size": 64, "tokens": ["cell-32"]}
    tokens = create_tokens(DetectorConfig.create(**options))
    tokens.fit(lambda: iter(images.split(20)))
    (normal,) = tokens.encode(images)
    distance = normal.square().mean(dim=(0, 3))
    assert distance.max() < 3 * distance.mean()
    broken = images[:1].clone()
    broken[..., 20:28, 30:34] -= 0.7
    (seen,) = tokens.encode(broken)
    y, x = divmod(int(seen.square().mean(dim=3)[0].argmax()), 32)
    assert 9 <= y <= 14 and 14 <= x <= 17


def test_vectors_by_feature_and_by_one_scale():
    rows = torch.randn(400, 3) * torch.tensor([1.0, 10.0, 0.0]) + 5
    for scale, expected in (
        ("feature", [1.0, 1.0]),
        ("global", [1 / math.sqrt(101 / 3), 10 / math.sqrt(101 / 3)]),
        ("auto", [1.0, 1.0]),
    ):
        tokens = VectorTokens(scale)
        tokens.fit(lambda: iter(rows.split(90)))
        (encoded,) = tokens.encode(rows)
        assert encoded.shape == (400, 1, 1, 3)
        found = encoded[:, 0, 0].std(dim=0, correction=0)
        assert found[:2].tolist() == pytest.approx(expected, rel=0.1) and found[2] < 1e-5
        assert encoded.mean(dim=(0, 1, 2)).abs().max() < 1e-5
    for constant in (1.0, 0.0):  # of half of the columns and of all of them
        tokens = VectorTokens("feature")
        tokens.fit(lambda k=constant: iter([torch.cat([rows[:, :1] * k, rows[:, 2:] * 1e3], 1)]))
        assert tokens.deviation[1] == 1.0 and tokens.mean[1] == pytest.approx(5e3)
    assert tokens.deviation.tolist() == [1.0, 1.0]
    wide = VectorTokens("auto")
    wide.fit(lambda: iter([torch.randn(50, 256)]))
    assert len(set(wide.deviation.tolist())) == 1


def test_features_need_a_backbone():
    with pytest.raises(InputError, match="pass features=module"):
        create_tokens(DetectorConfig.create(denoiser="token-mlp", tokens=["features"]))
