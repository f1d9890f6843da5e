"""Backbones by name. Their weights are drawn here: the hub that has the pretrained ones is away."""

import numpy as np
import pytest
import torch

import diffad_fast as daf
from diffad_fast.errors import InputError
from diffad_fast.integrations.timm import TimmFeatures

timm = pytest.importorskip("timm")
NAME = "resnet10t"
# Of ImageNet, as torchvision and timm state them.
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def _weights_of_a_seed(monkeypatch):
    original = timm.create_model

    def create(name, pretrained, **options):
        assert pretrained
        torch.manual_seed(0)
        return original(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)


@pytest.mark.parametrize("channels", [3, 1])
def test_images_are_standardised_as_in_pretraining(channels):
    images = torch.rand(2, channels, 64, 64)
    features = TimmFeatures(NAME, channels).eval()
    plain = timm.create_model(NAME, pretrained=True, features_only=True, in_chans=channels).eval()
    mean, deviation = (v if channels == 3 else v.mean().expand(1) for v in (MEAN, DEVIATION))
    expected = plain((images - mean[:, None, None]) / deviation[:, None, None])
    found = features(images)
    assert [f.shape[1] for f in found] == plain.feature_info.channels()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_in_a_detector(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.random((40, 1, 32, 32)).astype(np.float32) * 0.1 + 0.5
    detector = daf.Detector(
        image_size=32, haar_level=1, denoiser="unet-tiny", features=NAME, train_steps=3,
        map_weights=(1, 1, 0), mode="reconstruct", device="cpu", seed=0,
    )  # fmt: skip
    detector.fit(images)
    found = detector.score(images[:4])
    assert found.map.shape == (4, 32, 32) and np.isfinite(found.score).all()
    detector.save(tmp_path / "d.diffad")
    again = daf.load(tmp_path / "d.diffad", device="cpu").score(images[:4])
    np.testing.assert_allclose(again.score, found.score, rtol=1e-5)


def test_a_name_that_timm_does_not_have():
    with pytest.raises(InputError, match="timm cannot make features='resnet_of_nobody'"):
        daf.Detector(image_size=32, features="resnet_of_nobody", denoiser="unet-tiny")
