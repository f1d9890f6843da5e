"""Large images, seen through windows."""

import numpy as np
import pytest
import torch
from PIL import Image

import diffad_fast as daf
from diffad_fast.errors import InputError
from diffad_fast.models.tokens import windows
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
    x = torch.arange(side * 64.0).view(1, 1, side, 64)
    parts, places = windows(x, (64, 64), overlap)
    assert [top for top, _ in places] == starts and {left for _, left in places} == {0}
    gaps = np.diff(starts)
    assert (gaps <= 64 * (1 - overlap) + 1e-9).all() and starts[-1] + 64 == side
    for i, (top, _) in enumerate(places):
        assert torch.equal(parts[0, i], x[0, :, top : top + 64])


def test_a_map_is_the_mean_of_its_windows(detector):
    image = textures(2, 96, 130, 1)
    out = detector.score(image)
    assert out.map.shape == (2, 96, 130)
    parts, places = windows(image, (64, 64), 0.25)
    total, count = np.zeros((2, 96, 130)), np.zeros((96, 130))
    scores = []
    for i, (top, left) in enumerate(places):
        one = detector.score(parts[:, i])
        total[:, top : top + 64, left : left + 64] += one.map
        count[top : top + 64, left : left + 64] += 1
        scores.append(one.score)
    assert np.abs(out.map - total / count).max() < 1e-4
    assert out.score == pytest.approx(np.max(scores, axis=0), abs=1e-4)


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
