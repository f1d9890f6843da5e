"""The detector on a GPU, or with CUDA's operators on the CPU, agrees with the one on the CPU."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import diffad_fast as daf
from diffad_fast import ops

OPTIONS = {
    "image_size": 64,
    "denoiser": "unet-tiny",
    "haar_level": 2,
    "train_steps": 40,
    "reverse_steps": 3,
}


def images(n, seed):
    rng = np.random.default_rng(seed)
    smooth = rng.random((n, 8, 8)).repeat(8, 1).repeat(8, 2)
    return (0.8 * smooth + 0.2 * rng.random((n, 64, 64))).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A checkpoint, and what it scores on the CPU in each mode."""
    path = tmp_path_factory.mktemp("fitted") / "m.diffad"
    daf.Detector(**OPTIONS, device="cpu").fit(images(160, 0)).save(path)
    detector, found = daf.load(path, device="cpu"), {}
    for detector.mode in ("reconstruct", "invert", "one_step"):
        found[detector.mode] = detector.score(images(9, 1))
    return path, found


@pytest.mark.native
@pytest.mark.parametrize("mode", ["reconstruct", "invert", "one_step"])
def test_scores_agree_with_the_cpu(fitted, cuda, monkeypatch, mode):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not torch.backends.cuda.matmul.allow_tf32
    path, on_cpu = fitted
    with daf.use_backend("auto"):
        assert ops.diffusion.fused_steps(torch.device(cuda))
        detector = daf.load(path, device=cuda)
        detector.mode = mode
        found = detector.score(images(9, 1))
    # A GPU's convolutions add up in another order; in emulation they are the same.
    scores, maps = (1e-3, 1e-2) if cuda == "cuda" else (1e-6, 1e-5)
    np.testing.assert_allclose(found.score, on_cpu[mode].score, rtol=scores)
    np.testing.assert_allclose(found.map, on_cpu[mode].map, rtol=maps, atol=maps)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_detectors_score_at_once(fitted, device):
    """In threads, on a GPU on a stream each: what each gives alone."""
    path, _ = fitted
    given = images(9, 1), images(6, 2)
    alone = [daf.load(path, device=device).score(x) for x in given]
    together = threading.Barrier(2)

    def score(x):
        detector = daf.load(path, device=device)
        on_gpu = device == "cuda"
        with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
            together.wait(60)
            return [detector.score(x) for _ in range(4)]  # the second captures a graph

    with ThreadPoolExecutor(2) as pool:
        for expected, found in zip(alone, pool.map(score, given), strict=True):
            for again in found:
                np.testing.assert_array_equal(again.score, expected.score)
                np.testing.assert_array_equal(again.map, expected.map)


@pytest.mark.gpu
def test_fits_saves_and_repeats(tmp_path):
    detector = daf.Detector(**OPTIONS, device="cuda").fit(images(160, 0))
    assert detector.history.validation_loss[-1][1] < detector.history.validation_loss[0][1]
    first = detector.score(images(9, 1)).score
    np.testing.assert_array_equal(detector.score(images(9, 1)).score, first)
    detector.save(tmp_path / "m.diffad")
    loaded = daf.load(tmp_path / "m.diffad", device="cuda")
    np.testing.assert_allclose(loaded.score(images(9, 1)).score, first, rtol=1e-6)
