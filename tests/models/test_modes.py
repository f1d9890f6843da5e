"""Every mode on Gaussian data, for which the ideal denoiser, and so every score, is known."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from diffad_fast import ops
from diffad_fast.config import DetectorConfig
from diffad_fast.errors import InputError
from diffad_fast.models import CoefficientModel
from diffad_fast.scoring import MapStatistics

VARIANCE = 0.5


class IdealDenoiser(nn.Module):
    """E[x0 | x_t] = k x_t for x0 ~ N(0, VARIANCE), as a prediction of any kind."""

    def __init__(self, prediction_type):
        super().__init__()
        self.prediction_type = prediction_type

    def forward(self, x, log_sigma):
        sigma = log_sigma.double().exp().to(x)[:, None, None, None]
        a = (1 + sigma**2).rsqrt()
        b = sigma * a
        clean = shrinkage(a) * x
        return {
            "sample": clean,
            "epsilon": (x - a * clean) / b,
            "v_prediction": (a * x - clean) / b,
        }[self.prediction_type]

    def features(self, x, log_sigma):
        return [x]


def shrinkage(a):
    return a * VARIANCE / (a**2 * VARIANCE + 1 - a**2)


def carried(steps):
    """What a state at the first level is multiplied by on its way through the steps."""
    factor = 1.0
    for step in steps:
        a, b = step.alpha_t**0.5, (1 - step.alpha_t) ** 0.5
        k = shrinkage(a)
        factor *= step.alpha_s**0.5 * k + (1 - step.alpha_s) ** 0.5 * (1 - a * k) / b
    return factor


@pytest.fixture(params=["sample", "epsilon", "v_prediction"])
def model(request):
    config = DetectorConfig.create(
        image_size=32, haar_level=2, denoiser="custom", prediction_type=request.param,
        map_weights=(1, 0, 0), sigmas=(0.6, 1.5, 4.0), seed=3,
    )  # fmt: skip
    return CoefficientModel(config, torch.device("cpu"), IdealDenoiser(request.param))


def switch(model, mode):
    model.config = model.config.replace(mode=mode)
    model.use(None)


IMAGES = torch.rand(3, 1, 32, 32)
COEFFICIENTS = ops.haar_pack(IMAGES, 2)


@torch.inference_mode()
def test_one_step(model):
    switch(model, "one_step")
    maps = model.raw_maps(IMAGES)
    assert len(maps) == len(model.map_names) == 3
    for map_, sigma in zip(maps, model.config.sigmas, strict=True):
        expected = (sigma**2 / (VARIANCE + sigma**2) * COEFFICIENTS).square().mean(dim=1)
        assert torch.allclose(map_, expected, rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_invert(model):
    switch(model, "invert")
    (map_,) = model.raw_maps(IMAGES)
    steps = model.schedule.inversion_steps(0.1, 10.0, 3)
    latent = carried(steps) * steps[0].alpha_t ** 0.5 * COEFFICIENTS
    assert torch.allclose(map_, latent.square().mean(dim=1), rtol=1e-4)


@torch.inference_mode()
def test_trajectory(model):
    """x / a grows by the root of (variance + sigma_s^2) / (variance + sigma_t^2) in the limit of
    small steps; here by what each step's factor says."""
    switch(model, "invert")
    latent, ways = model.trajectory(IMAGES)
    x, steps = COEFFICIENTS, model._steps_of("invert")
    for i, step in enumerate(steps):
        a_t, a_s = step.alpha_t**0.5, step.alpha_s**0.5
        x_s = carried([step]) * (x * a_t) / a_s
        assert torch.allclose(ways[:, i], (x_s - x).square().mean(dim=(1, 2, 3)), rtol=1e-3)
        x = x_s
    assert torch.allclose(latent, (x * a_s).square().mean(dim=(1, 2, 3)), rtol=1e-3)


@torch.inference_mode()
def test_reconstruct(model):
    switch(model, "reconstruct")
    map_, *others = model.raw_maps(IMAGES)
    assert others == [None, None]
    start = model.schedule.timestep(model.config.start_sigma)
    steps = model.schedule.reverse_steps(start, model.config.reverse_steps)
    alpha, noise = steps[0].alpha_t, ops.philox_normal((1, *COEFFICIENTS.shape[1:]), 3)
    found = carried(steps) * (alpha**0.5 * COEFFICIENTS + (1 - alpha) ** 0.5 * noise)
    expected = (IMAGES - ops.haar_unpack(found, 2)).abs().mean(dim=1)
    assert torch.allclose(map_, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(model.reconstruct(IMAGES), ops.haar_unpack(found, 2), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["one_step", "invert"])
def test_the_score_is_the_fused_map(model, mode):
    """Standardised, averaged, smoothed; the mean of the highest hundredth (here: of one)."""
    switch(model, mode)
    maps = model.raw_maps(IMAGES)
    statistics = [MapStatistics(torch.rand(8, 8), 0.1 + torch.rand(8, 8)) for _ in range(len(maps))]
    model.use(statistics)
    total = sum((m - s.mean) / s.deviation for m, s in zip(maps, statistics, strict=True))
    total = (total / len(maps)).numpy()
    expected = np.stack([gaussian_filter(t, 0.5 / 4, mode="reflect", truncate=4) for t in total])
    map_, score = model.score(IMAGES)
    assert map_.shape == (3, 32, 32)
    assert score.numpy() == pytest.approx(expected.max(axis=(1, 2)), rel=1e-4)
    # Bilinear from 8 to 32: the centre of every block of 4 lies between four equal steps.
    middle = map_[:, 1:-1, 1:-1].reshape(3, -1).amax(dim=1)
    assert (middle <= score + 1e-5).all()


@pytest.mark.parametrize("map_weights", [(1, 0, 0), (1, 1, 0)])
@torch.inference_mode()
def test_semantic_map_in_every_mode(map_weights):
    """The denoiser's features are the coefficients here, whose whitening is known."""
    config = DetectorConfig.create(
        image_size=32, haar_level=1, denoiser="custom", map_weights=map_weights, semantic_weight=0.5
    )
    model = CoefficientModel(config, torch.device("cpu"), IdealDenoiser("v_prediction"))
    normal = ops.haar_pack(torch.rand(40, 1, 32, 32), 1).permute(0, 2, 3, 1)
    model.distance.fit([normal], seed=0)
    rows = normal.reshape(-1, 4).double()
    # The features are read at sqrt(alpha) x.
    inputs = COEFFICIENTS_1 * (1 + config.feature_sigma**2) ** -0.5
    centred = inputs.permute(0, 2, 3, 1).double() - rows.mean(dim=0)
    inverse = torch.linalg.inv(torch.cov(rows.T, correction=0))
    expected = torch.einsum("nhwi,ij,nhwj->nhw", centred, inverse, centred) / 4
    for mode in ("one_step", "invert"):
        switch(model, mode)
        maps = model.raw_maps(IMAGES)
        assert len(maps) == len(model.map_names)
        assert torch.allclose(maps[-1].double(), expected, rtol=1e-3)
    switch(model, "reconstruct")
    maps = model.raw_maps(IMAGES)
    assert maps[-1].shape == maps[0].shape == (3, 32, 32)
    one = MapStatistics(torch.tensor(0.2), torch.tensor(2.0))
    model.use([one, one if map_weights[1] else None, None, one])
    fused, _ = model.score(IMAGES)
    standard = [(m.numpy() - 0.2) / 2 for m in maps if m is not None]
    smooth = np.stack(
        [gaussian_filter(m, 0.5, mode="reflect", truncate=4) for m in sum(standard[:-1])]
    )
    together = (smooth + 0.5 * standard[-1]) / (sum(map_weights) + 0.5)
    assert np.abs(fused.numpy() - together).max() < 1e-4


COEFFICIENTS_1 = ops.haar_pack(IMAGES, 1)


class Means(nn.Module):
    """A backbone that answers with a tensor, not with a list."""

    def forward(self, images):
        return nn.functional.avg_pool2d(images, 4).repeat(1, 3, 1, 1)


def test_a_backbone_of_a_u_net():
    config = DetectorConfig.create(image_size=32, haar_level=1, denoiser="custom")
    ideal, images = IdealDenoiser("v_prediction"), torch.rand(2, 1, 32, 32)
    one, alike = Means(), lambda x: [Means()(x)]
    found = []
    for features in (one, nn.Module()):
        if features is not one:
            features.forward = alike
        model = CoefficientModel(config, torch.device("cpu"), ideal, features)
        model.representation.fit([images])
        found.append(model.raw_maps(images)[1])
    assert found[0].shape == (2, 32, 32) and torch.equal(*found)


def test_a_denoiser_without_features():
    class Plain(nn.Module):
        def forward(self, x, log_sigma):
            return x

    for options in ({}, {"map_weights": (1, 0, 1), "semantic_weight": 1.0}):
        config = DetectorConfig.create(image_size=32, denoiser="custom", **options)
        with pytest.raises(InputError, match="Plain has no method features"):
            CoefficientModel(config, torch.device("cpu"), Plain())
    config = DetectorConfig.create(image_size=32, denoiser="custom", map_weights=(1, 0, 1))
    CoefficientModel(config, torch.device("cpu"), Plain())
