"""What a CUDA graph cannot capture is in no score: copies from the host, values given to it."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffad_fast as daf

# What each dispatches is a copy from the host, or makes it wait for a number of the device.
FORBIDDEN = {
    "lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal",
    "unique_dim", "_unique2", "repeat_interleave",
}  # fmt: skip


class Capturable(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in FORBIDDEN, f"{function} cannot be captured"
        return function(*args, **(kwargs or {}))


def images(n):
    rng = np.random.default_rng(0)
    smooth = rng.random((n, 1, 8, 8)).repeat(4, 2).repeat(4, 3)
    return (0.8 * smooth + 0.2 * rng.random((n, 1, 32, 32))).astype(np.float32)


def waves(n):
    return [np.random.default_rng(i).standard_normal(8000).astype(np.float32) for i in range(n)]


class Ear(torch.nn.Module):
    samples = 8000

    def forward(self, waves):
        return torch.fft.rfft(waves)[:, 1:4001].abs().unflatten(1, (8, -1)).mean(dim=2)


SMALL = {"image_size": 32, "haar_level": 2, "denoiser": "unet-tiny", "train_steps": 2}
TOKENS = {"token_width": 32, "token_blocks": 1, "train_steps": 2}
DETECTORS = {
    "U-Net": (SMALL, images),
    "U-Net, semantic": ({**SMALL, "semantic_weight": 0.5}, images),
    "tokens": ({"image_size": 32, "preset": "fast", **TOKENS}, images),
    "tokens, semantic": (
        {"image_size": 32, "preset": "fast", **TOKENS, "semantic_weight": 0.5}, images,
    ),
    "vectors": (
        {"kind": "vector", **TOKENS},
        lambda n: np.random.default_rng(0).standard_normal((n, 6)).astype(np.float32),
    ),
    "audio": ({"kind": "audio", **TOKENS}, waves),
    "audio, semantic": ({"kind": "audio", **TOKENS, "features": Ear()}, waves),
}  # fmt: skip


@pytest.mark.parametrize("name", DETECTORS)
def test_a_score_can_be_captured(name):
    options, make = DETECTORS[name]
    if options.get("kind") == "audio":
        pytest.importorskip("soundfile"), pytest.importorskip("soxr")
    source = make(40)
    if options.get("kind") == "audio":
        source = [(wave, 8000) for wave in source]
    detector = daf.Detector(**options, seed=0).fit(source)
    x = next(iter(detector.open(source).batches(2))).x
    with torch.inference_mode():
        for mode in ("reconstruct", "invert", "one_step"):
            detector.mode = mode
            first = detector.model.score(x)  # makes what is kept
            with Capturable():
                again = detector.model.score(x)
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a, b)
