"""Detectors on tokens: vectors, and cells of images."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import diffad_fast as daf
from diffad_fast.config import MODES
from diffad_fast.errors import CheckpointError, InputError

SMALL = {"token_width": 64, "token_blocks": 2, "token_batch": 256, "device": "cpu"}
rng = np.random.default_rng(0)
MIXING = rng.standard_normal((6, 6))


def rows(n, seed):
    return np.random.default_rng(seed).standard_normal((n, 6)) @ MIXING + 2


def textures(n, seed, side=64):
    """Smoothed noise of one scale."""
    x = torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(seed))
    x = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    return (0.5 + 0.3 * x).clamp(0, 1)


@pytest.fixture(scope="module")
def vectors():
    return daf.Detector("vector", train_steps=400, **SMALL).fit(rows(1500, 1))


@pytest.fixture(scope="module")
def cells():
    options = {"tokens": ["energy-16", "patch-8"], "train_steps": 60, "semantic_weight": 0.3}
    detector = daf.Detector("image", 64, denoiser="token-mlp", **options, **SMALL)
    return detector.fit(textures(120, 0))


def test_residuals_are_those_of_the_gaussian(vectors):
    """Trained on N(0, S), D(x, sigma) - x is near -sigma^2 (S + sigma^2)^-1 x."""
    new = torch.from_numpy(rows(300, 2)).float()
    model = vectors.model
    tokens = model.representation.encode(new)[0].flatten(0, 2).double()
    covariance = torch.cov(
        model.representation.encode(torch.from_numpy(rows(20000, 3)).float())[0].flatten(0, 2).T
    ).double()
    with torch.inference_mode():
        maps = model.raw_maps(new)
    *residuals, _ = maps  # the last is the distance to the nearest normals
    for map_, sigma in zip(residuals, vectors.config.sigmas, strict=True):
        shrunk = torch.linalg.inv(covariance + sigma**2 * torch.eye(6)) * sigma**2
        expected = (tokens @ shrunk).square().mean(dim=1)
        found = map_.flatten().double().exp()
        error = (found - expected).abs().mean() / expected.mean()
        assert error < 0.12, (sigma, error)
        assert np.corrcoef(found, expected)[0, 1] > 0.97


def test_modes_share_one_model(vectors):
    """Outliers along the least direction stand out in every mode; switching back changes nothing"""
    normal, outliers = rows(200, 4), rows(100, 5)
    outliers += 4 * np.linalg.svd(MIXING)[2][-1] * np.sqrt(np.linalg.svd(MIXING)[1][-1] + 1)
    weights = {k: v.clone() for k, v in vectors.model.state().items()}
    first = vectors.score(normal)
    assert first.map is None and first.score.shape == (200,)
    for mode in MODES:
        vectors.mode = mode
        scores = vectors.score(np.concatenate([normal, outliers])).score
        assert daf.metrics.auroc(np.repeat([0, 1], [200, 100]), scores) > 0.75, mode
    vectors.mode = "one_step"
    assert np.array_equal(vectors.score(normal).score, first.score)
    assert all(torch.equal(v, weights[k]) for k, v in vectors.model.state().items())


def test_trajectory(vectors):
    near, far = (vectors.trajectory(rows(50, 12) + shift) for shift in (0, 8))
    assert near.residuals.shape == (50, vectors.config.inversion_steps)
    assert np.allclose(near.path_length, np.sqrt(near.residuals).sum(axis=1))
    assert far.latent_norm.min() > np.median(near.latent_norm)
    vectors.mode = "invert"
    with torch.inference_mode():
        latent, _ = vectors.model.raw_maps(torch.from_numpy(rows(50, 12)).float())
    assert latent.exp().flatten().numpy() == pytest.approx(near.latent_norm, rel=1e-4)
    vectors.mode = "one_step"


@pytest.mark.parametrize("mode", MODES)
def test_false_positives_are_beta_binomial(vectors, mode):
    """Fresh normals: k of m above the threshold, with n calibration scores and rank r of p <= rate,
    follow BetaBinomial(m, r, n + 1 - r)."""
    vectors.mode = mode
    n, m = len(vectors.conformal.scores), 2000
    rank = int(np.floor(0.05 * (n + 1) + 1e-9))
    k = vectors.score(rows(m, 6)).label.sum()
    low, high = scipy.stats.betabinom(m, rank, n + 1 - rank).interval(0.9995)
    assert low <= k <= high
    vectors.mode = "one_step"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["vectors", "cells"])
def test_a_score_does_not_depend_on_its_neighbours(name, mode, request):
    detector = request.getfixturevalue(name)
    before = detector.mode
    detector.mode = mode
    new = rows(30, 7).astype(np.float32) if name == "vectors" else textures(30, 7).numpy()
    whole = detector.score(new).score
    assert np.array_equal(whole, detector.score(new).score)
    # One row takes another path through the matrix products: equal up to their rounding.
    alone = np.concatenate([detector.score(new[i : i + 1]).score for i in (0, 17, 29)])
    assert alone == pytest.approx(whole[[0, 17, 29]], rel=1e-4, abs=1e-4)
    detector.mode = before


@pytest.mark.parametrize("name", ["vectors", "cells"])
def test_save_and_load(name, request, tmp_path):
    detector = request.getfixturevalue(name)
    detector.save(tmp_path / "d.diffad")
    loaded = daf.load(tmp_path / "d.diffad", device="cpu")
    new = rows(9, 8) if name == "vectors" else textures(9, 8).numpy()
    assert loaded.config == detector.config
    for mode in MODES:
        detector.mode = loaded.mode = mode
        a, b = detector.score(new), loaded.score(new)
        assert np.array_equal(a.score, b.score) and np.array_equal(a.p_value, b.p_value)
    detector.mode = "one_step"


def test_what_fit_chose_of_preprocessing_is_kept(cells):
    """Texture with a constant noise and no lamp: its slow part differs from image to image."""
    config = cells.config
    assert (config.intensity, config.illumination, config.image_scale) == ("linear", 3.0, False)
    assert cells.model.representation.preprocessing.choices["illumination"] == 3.0


def test_cells_find_a_spot(cells):
    new = textures(40, 9)
    new[20:, :, 36:44, 20:28] = 0.9
    out = cells.score(new)
    assert daf.metrics.auroc(np.repeat([0, 1], 20), out.score) > 0.95
    y, x = np.unravel_index(out.map[20:].reshape(20, -1).argmax(axis=1), (64, 64))
    assert np.median(np.hypot(y - 40, x - 24)) < 12
    assert len(cells.model.map_names) == len(cells.statistics) == 8


@pytest.mark.parametrize("tokens, side", [("cell-32", 64), ("gradient-32", 64), ("patch-32", 64),
                                          ("cell-32", 96)])  # fmt: skip
def test_a_map_lies_over_the_image(tokens, side):
    """On average over defects, and over the same upside down, a map's centre is the defect's."""
    options = {**SMALL, "denoiser": "token-mlp", "tokens": (tokens,), "cross_fit": 0}
    detector = daf.Detector("image", side, train_steps=40, **options)
    detector.fit(textures(40, 0, side))
    images, draw = textures(250, 1, side), np.random.default_rng(2)
    middles = draw.integers(side // 4, side - side // 4, (len(images), 2))
    for image, (y, x) in zip(images[:, 0], middles, strict=True):
        image[y - 2 : y + 3, x - 2 : x + 3] = torch.from_numpy(draw.integers(0, 2, (5, 5)))
    turned = side - 1 - middles
    found, near = [], np.arange(-12, 13)
    for maps, places in (
        (detector.score(images).map, middles),
        (detector.score(images.flip(2, 3)).map, turned),
    ):
        for map_, (y, x) in zip(maps, places, strict=True):
            part = map_[y - 12 : y + 13, x - 12 : x + 13]
            part = (part - part.max() / 3).clip(0)
            found.append([part.sum(axis=1) @ near, part.sum(axis=0) @ near] / part.sum())
    assert np.abs(np.mean(found, axis=0)).max() < 0.2


def test_augmentation_reaches_the_tokens():
    """Noise that normals had in training makes no anomalies of them, and is one otherwise."""
    new = textures(60, 9)
    noise = 0.02 * torch.randn(new.shape, generator=torch.Generator().manual_seed(10))
    spots = new.clone()
    spots[:, :, 20:36, 30:46] = 0.5
    share = {}
    for augment in ((), ("noise",)):
        options = {"tokens": ["energy-8"], "train_steps": 150, "augment": augment, **SMALL}
        options["cross_fit"] = 0
        detector = daf.Detector("image", 64, denoiser="token-mlp", **options)
        detector.fit(textures(120, 0))
        clean, noisy, anomalous = (
            detector.score(x.clamp(0, 1), maps=False).score for x in (new, new + noise, spots)
        )
        share[augment] = np.mean(noisy > np.quantile(clean, 0.95))
        assert daf.metrics.auroc(np.repeat([0, 1], 60), np.concatenate([clean, anomalous])) > 0.9
    assert share[()] > 0.9 and share["noise",] < 0.3, share


def test_a_backbones_features(tmp_path):
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(1, 8, 3, padding=1)

        def forward(self, x):
            fine = self.convolution(x)
            return [nn.functional.avg_pool2d(fine, 8), nn.functional.avg_pool2d(fine, 16)]

    backbone = Backbone()
    options = {"tokens": ["features"], "denoiser": "token-mlp", "train_steps": 20, **SMALL}
    detector = daf.Detector("image", 64, features=backbone, **options).fit(textures(60, 0))
    assert detector.model.denoisers[0].dim == 16
    assert detector.score(textures(3, 1)).map.shape == (3, 64, 64)
    detector.save(tmp_path / "d.diffad")
    with pytest.raises(CheckpointError, match="pass features=module"):
        daf.load(tmp_path / "d.diffad")
    with pytest.raises(CheckpointError, match="other weights of its features"):
        daf.load(tmp_path / "d.diffad", features=Backbone())
    loaded = daf.load(tmp_path / "d.diffad", features=backbone, device="cpu")
    assert np.array_equal(loaded.score(textures(3, 1)).score, detector.score(textures(3, 1)).score)


def test_evaluate_a_table(vectors):
    labels = np.repeat([0, 1], [80, 40])
    table = np.concatenate([rows(80, 10), rows(40, 11) + 6])
    figures = vectors.evaluate((table, labels))
    scores = vectors.score(table).score
    assert figures["auroc"] == daf.metrics.auroc(labels, scores)
    assert figures["n_normal"] == 80 and figures["n_anomalous"] == 40
    assert figures["undefined"] == {} and figures["true_positive_rate"] > 0.5
    with pytest.raises(InputError, match="no labels"):
        vectors.evaluate(table)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"denoiser": "unet-tiny"}, "vector needs 'token-mlp'"),
        ({"prediction_type": "epsilon"}, "prediction_type is for U-Nets"),
        ({"eta": 0.5}, "eta is for U-Nets"),
        ({"kind": "image", "denoiser": "token-mlp", "tokens": ["energy-12"]}, "energy-12"),
        ({"kind": "image", "denoiser": "token-mlp", "tokens": []}, "tokens is empty"),
        ({"sigmas": ()}, "sigmas is empty"),
        ({"inversion_sigmas": (3.0, 1.0)}, "a lower and a higher"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(InputError, match=message):
        daf.Detector(**{"kind": "vector", **options})


def test_vectors_of_another_width(vectors):
    with pytest.raises(InputError, match="5 features and the detector was fitted on 6"):
        vectors.score(np.zeros((3, 5)))
    with pytest.raises(InputError, match="not images"):
        vectors.reconstruct(torch.zeros(1, 1, 8, 8))


class Vectors(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


def test_a_backbone_that_gives_no_maps():
    options = {"tokens": ["features"], "denoiser": "token-mlp", "train_steps": 2, **SMALL}
    with pytest.raises(InputError, match=r"answered \d+ images with \(\d+, 1\): it must give"):
        daf.Detector("image", 64, features=Vectors(), **options).fit(textures(60, 0))


@pytest.mark.parametrize("options, message", [
    ({"kind": "vector", "reverse_steps": 2000}, "reverse_steps must be from 1 to"),
    ({"denoiser": "unet-tiny", "start_sigma": 0.01}, "reverse_steps must be from 1 to 2"),
    ({"kind": "audio", "statistics": "auto"}, "statistics='auto' is for images"),
    ({"tokens": 3}, "tokens must be a list, not 3"),
    ({"sigmas": 2.0}, "sigmas must be a list, not 2.0"),
    ({"image_size": None}, "image_size is a whole number of pixels"),
    ({"map_weights": ("a", 1, 1)}, "map_weights must be a number from 0 to 1e.06, not 'a'"),
    ({"smoothing": float("inf")}, "smoothing must be a number from 0 to 100000, not inf"),
    ({"semantic_weight": float("nan")}, "semantic_weight must be a number from 0 to 1e.06"),
    ({"train_budget": float("inf")}, "train_budget must be a number from 0.001 to 1e.08"),
])  # fmt: skip
def test_what_is_impossible_is_said_before_any_training(options, message):
    with pytest.raises(InputError, match=message):
        daf.Detector(**options)
    assert daf.Detector(tokens="energy-16", augment="blur").config.tokens == ("energy-16",)
