"""A public diffusion detector of images."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from benchmarks.quality import anoddpm
from diffad_fast.errors import InputError


def test_a_public_detector_of_images_trains_on_normals_and_is_scored_by_its_error(tmp_path):
    """By a stand-in for its code: a network that learns the images' mean and gives it back."""
    (tmp_path / "UNet.py").write_text(
        "import torch\n"
        "class UNetModel(torch.nn.Module):\n"
        "    def __init__(self, side, width, n_heads, in_channels):\n"
        "        super().__init__()\n"
        "        assert (side, width, n_heads, in_channels) == (16, 4, 2, 3)\n"
        "        self.mean = torch.nn.Parameter(torch.zeros(in_channels, side, side))\n"
        "def update_ema_params(target, source, decay):\n"
        "    assert decay == 0.9999 ** (300_100 / 40)\n"
        "    target.mean.data.mul_(decay).add_(source.mean.data, alpha=1 - decay)\n"
    )
    (tmp_path / "GaussianDiffusion.py").write_text(
        "import torch\n"
        "seen = []\n"
        "def get_beta_schedule(count, name):\n"
        "    return count, name\n"
        "class GaussianDiffusionModel:\n"
        "    def __init__(self, size, betas, img_channels, loss_type, loss_weight, noise):\n"
        "        assert (size, betas, img_channels) == ([16, 16], (1000, 'linear'), 3)\n"
        "        assert (loss_type, loss_weight, noise) == ('l2', 'none', 'simplex')\n"
        "    def p_loss(self, model, x, args):\n"
        "        assert args == {'train_start': True, 'sample_distance': 800}\n"
        "        # What the step before has left: gradients are clipped.\n"
        "        assert not seen or abs(model.mean.grad.norm() - 1) < 1e-3\n"
        "        seen.append(x)\n"
        "        return 1e4 * (model.mean - x).mean(), ()\n"
        "    def forward_backward(self, model, x, see_whole_sequence, t_distance, denoise_fn):\n"
        "        assert not model.training and t_distance == 200 and denoise_fn == 'noise_fn'\n"
        "        assert see_whole_sequence is None\n"
        "        return model.mean.data[None]\n"
    )
    rng = np.random.default_rng(0)
    train, test = (rng.random((n, 3, 16, 16), dtype=np.float32) for n in (20, 5))
    maps, scores, costs = anoddpm.detect(tmp_path, train, test, seed=5, steps=40, width=4)
    # AdamW's steps against a gradient that never changes are of 1e-4, after clipping too.
    decay, mean, averaged = 0.9999 ** (300_100 / 40), 0.0, 0.0
    for _ in range(40):
        mean -= 1e-4
        averaged = decay * averaged + (1 - decay) * mean
    expected = ((2 * test - 1 - averaged) ** 2).mean(axis=1)
    np.testing.assert_allclose(maps, expected, rtol=3e-6)
    highest = np.sort(expected.reshape(5, -1), axis=1)[:, -3:]  # a hundredth of 256
    np.testing.assert_allclose(scores, highest.mean(axis=1), rtol=3e-6)
    assert costs["fit_seconds"] > 0 and costs["latency_ms"] > 0
    seen = torch.cat(sys.modules["GaussianDiffusion"].seen).numpy()
    assert len(seen) == 40 and not np.array_equal(seen[:20], seen[20:])
    assert not np.array_equal(seen[:20], 2 * train - 1)
    for epoch in (seen[:20], seen[20:]):
        assert {image.tobytes() for image in epoch} == {(2 * x - 1).tobytes() for x in train}
    for name in ("GaussianDiffusion", "UNet"):
        del sys.modules[name]
    with pytest.raises(InputError, match="no clone of https://github.com/Julian-Wyatt/AnoDDPM: Ga"):
        anoddpm.detect(tmp_path / "none", train, test, seed=5, steps=1, width=4)
    (tmp_path / "UNet.py").write_text("import no_such_package")
    with pytest.raises(InputError, match="AnoDDPM needs the package no_such_package"):
        anoddpm.detect(tmp_path, train, test, seed=5, steps=1, width=4)
