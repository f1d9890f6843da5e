"""Large images, seen through windows."""

import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import diffad_fast as daf
from diffad_fast.errors import InputError
from diffad_fast.models import tokens
from diffad_fast.models.tokens import WINDOWS, places
from diffad_fast.representations import ImageTokens
from diffad_fast.scoring import own_part

OPTIONS = {
    "image_size": 64, "overlap": 0.25, "denoiser": "token-mlp", "token_width": 32,
    "token_blocks": 1, "token_batch": 256, "train_steps": 30, "device": "cpu",
    "tokens": ["cell-16", "spread-2"], "conformal_share": 0.4,
}  # fmt: skip


def textures(n, height, width, seed):
    x = torch.randn(n, 1, height, width, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    return (0.5 + 0.3 * x).clamp(0, 1)


@pytest.fixture(scope="module")
def detector():
    return daf.Detector(**OPTIONS).fit(textures(60, 96, 130, 0))


@pytest.mark.parametrize("side, overlap, starts", [
    (64, 0.25, [0]), (65, 0.0, [0, 1]), (128, 0.0, [0, 64]), (128, 0.25, [0, 32, 64]),
    (200, 0.5, [0, 27, 54, 81, 108, 136]),
    # 57 pixels apart at most, since 57.6 is no step of whole pixels.
    (64 + 173, 0.1, [0, 43, 86, 129, 173]),
])  # fmt: skip
def test_windows_cover_everything(side, overlap, starts):
    found = places((side, 64), (64, 64), overlap)
    assert [top for top, _ in found] == starts and {left for _, left in found} == {0}
    gaps = np.diff(starts)
    assert (gaps <= 64 * (1 - overlap) + 1e-9).all() and starts[-1] + 64 == side


def test_a_map_fades_from_window_to_window(detector):
    """By weights that fall linearly from a window's middle to its borders."""
    image = textures(2, 96, 130, 1)
    out = detector.score(image)
    assert out.map.shape == (2, 96, 130)
    side = np.minimum(np.arange(1, 65), np.arange(64, 0, -1))
    weight = side[:, None] * side
    total, share = np.zeros((2, 96, 130)), np.zeros((96, 130))
    scores = []
    for top, left in places((96, 130), (64, 64), 0.25):
        one = detector.score(image[:, :, top : top + 64, left : left + 64].contiguous())
        total[:, top : top + 64, left : left + 64] += weight * one.map
        share[top : top + 64, left : left + 64] += weight
        scores.append(one.score)
    assert np.abs(out.map - total / share).max() < 1e-4
    assert out.score == pytest.approx(np.max(scores, axis=0), abs=1e-4)


def test_no_seams(detector):
    """A map does not change faster where a window begins or ends than elsewhere."""
    map_ = detector.score(textures(16, 96, 130, 4)).map
    steps = np.abs(np.diff(map_, axis=2)).mean(axis=(0, 1))
    borders = {left for _, left in places((96, 130), (64, 64), 0.25)} - {0}
    borders = sorted(borders | {left + 64 for left in borders | {0}} - {130})
    at = np.array([b - 1 for b in borders])
    assert steps[at].mean() < 2 * np.delete(steps, at).mean()


def test_many_windows_go_through_in_parts(detector):
    """More than are scored together: each image's map and score are those that it has alone."""
    images = textures(3, 300, 300, 7)
    assert 3 * len(places((300, 300), (64, 64), 0.25)) > 3 * WINDOWS
    with pytest.warns(UserWarning, match="windows"):
        out, last = detector.score(images), detector.score(images[2:])
    assert np.array_equal(out.map[2:], last.map) and out.score[2] == last.score[0]


@pytest.mark.parametrize("share", [7, 10**6])
def test_tokens_of_windows_that_are_not_trained_on_are_let_go(detector, share, monkeypatch):
    """At most those of two parts are in memory, whatever the images' size."""
    images, model, alive, most = textures(3, 300, 300, 7), detector.model, [], []
    encode, dims = model.representation.encode, model.representation.dims

    def encoding(part):
        most.append(sum(grid() is not None for grid in alive))
        grids = encode(part)
        alive.extend(map(weakref.ref, grids))
        return grids

    with monkeypatch.context() as patch:
        patch.setattr(model.representation, "encode", encoding)
        found = model._tokens(images, share, torch.Generator().manual_seed(1))
    assert len(most) > 3 and max(most) <= len(dims)
    generator = torch.Generator().manual_seed(1)
    for chosen, whole in zip(found, model._encoded(images), strict=True):
        rows = whole.reshape(3, -1, whole.shape[-1])
        if share < rows.shape[1]:
            rows = rows[:, torch.randperm(rows.shape[1], generator=generator)[:share]]
        assert torch.equal(chosen, rows.flatten(0, 1))


def test_statistics_are_of_so_many_windows(monkeypatch):
    """Of large images as many are drawn, from all of them, as of small ones there are."""
    fit, seen = ImageTokens.fit, []

    def fitting(self, batches, *plain):
        seen.append([part for part in batches()])
        assert all(map(torch.equal, seen[-1], batches()))
        fit(self, batches, *plain)

    monkeypatch.setattr(ImageTokens, "fit", fitting)
    monkeypatch.setattr(tokens, "LARGEST_FIT", 60)
    for size in ((64, 64), (96, 130)):
        images = textures(40, *size, 0)
        images[:] = torch.arange(40)[:, None, None, None] / 40 + images / 1000
        found = daf.Detector(**{**OPTIONS, "train_steps": 2, "cross_fit": 0}).fit(images)
        number = len(found.parts[0].split.fit)
        windows = torch.cat(seen.pop())
        different = len({int(40 * x.mean()) for x in windows})
        if size == (64, 64):
            assert different == len(windows) == number
        else:
            assert different > number / 2 and 55 < len(windows) <= 60


def test_the_way_into_noise_of_large_images(detector):
    images = textures(2, 96, 130, 6)
    found = detector.trajectory(images)
    assert found.latent_norm.shape == (2,) and found.residuals.shape == (2, 3)
    parts = [
        detector.trajectory(images[:, :, y : y + 64, x : x + 64].contiguous())
        for y, x in places((96, 130), (64, 64), 0.25)
    ]
    expected = np.mean([part.residuals for part in parts], axis=0)
    assert found.residuals == pytest.approx(expected, rel=1e-5)


def test_images_of_all_sizes(detector, tmp_path):
    """Each in its own resolution; a spot is found where it is."""
    sizes = [(64, 64), (96, 130), (200, 70)]
    for i, size in enumerate(sizes):
        image = textures(1, *size, seed=5 + i)[0, 0]
        image[size[0] - 14 : size[0] - 4, 40:50] = 1.0
        Image.fromarray((image.numpy() * 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="200x70 pixels has 8 windows .* had at most 6") as warned:
        out = detector.score(tmp_path)
    assert len(warned) == 1
    assert out.map.shape == (3, 200, 130)
    for i, size in enumerate(sizes):
        map_ = own_part(out.map[i])
        assert map_.shape == size and np.isnan(out.map[i]).sum() == 200 * 130 - size[0] * size[1]
        y, x = np.unravel_index(map_.argmax(), size)
        assert np.hypot(y - (size[0] - 9), x - 45) < 14
    clean = detector.score(textures(20, 96, 130, 9)).score
    assert out.score.min() > np.median(clean)


def test_what_cannot_be_windows(detector):
    with pytest.raises(InputError, match="60"):
        detector.score(textures(2, 60, 100, 3))
    for options in ({"denoiser": "unet-tiny"}, {"kind": "vector"}):
        with pytest.raises(InputError, match="overlap is for images and the token MLP"):
            daf.Detector(**{"overlap": 0.1, **options})
    with pytest.raises(InputError, match="overlap must be a number from 0 to 0.9"):
        daf.Detector(overlap=1.0)
