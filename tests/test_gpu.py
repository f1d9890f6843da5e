"""The detector on a GPU agrees with the one on the CPU."""

import numpy as np
import pytest
import torch

import diffad_fast as daf

pytestmark = pytest.mark.gpu
OPTIONS = {"image_size": 64, "denoiser": "unet-tiny", "train_steps": 40, "reverse_steps": 3}


def images(n, seed):
    rng = np.random.default_rng(seed)
    smooth = rng.random((n, 8, 8)).repeat(8, 1).repeat(8, 2)
    return (0.8 * smooth + 0.2 * rng.random((n, 64, 64))).astype(np.float32)


def test_scores_agree_with_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not torch.backends.cuda.matmul.allow_tf32
    daf.Detector(**OPTIONS, device="cpu").fit(images(160, 0)).save(tmp_path / "m.diffad")
    cpu = daf.load(tmp_path / "m.diffad", device="cpu").score(images(9, 1))
    gpu = daf.load(tmp_path / "m.diffad", device="cuda").score(images(9, 1))
    np.testing.assert_allclose(gpu.score, cpu.score, rtol=1e-3)
    np.testing.assert_allclose(gpu.map, cpu.map, rtol=1e-2, atol=1e-2)


def test_fits_saves_and_repeats(tmp_path):
    detector = daf.Detector(**OPTIONS, device="cuda").fit(images(160, 0))
    assert detector.history.validation_loss[-1][1] < detector.history.validation_loss[0][1]
    first = detector.score(images(9, 1)).score
    np.testing.assert_array_equal(detector.score(images(9, 1)).score, first)
    detector.save(tmp_path / "m.diffad")
    loaded = daf.load(tmp_path / "m.diffad", device="cuda")
    np.testing.assert_allclose(loaded.score(images(9, 1)).score, first, rtol=1e-6)
