from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
from PIL import Image

from diffad_fast.data import demo
from diffad_fast.data.image_files import read_mask
from diffad_fast.data.mvtec import mvtec_test, mvtec_train
from diffad_fast.errors import InputError


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def photos():
    return demo.photographs()


def write(folder, **options):
    options = {"texture": "brick", "side": 64, "train": 8, "test": 2, "seed": 0, **options}
    demo.write_data(folder / "data", folder / "null", **options)


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.png")
    }


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_train_and_test_share_no_pixel(photos, tmp_path, monkeypatch):
    # The training part of this photograph is dark and the test part is bright.
    marked = np.where(np.arange(512) < demo.TRAIN_COLUMNS, 0.2, 0.8) + 0.1 * photos["brick"]
    monkeypatch.setattr(demo, "photographs", lambda: {**photos, "brick": marked})
    write(tmp_path)
    for folder, low, high in (
        (tmp_path / "data" / "train" / "good", 0.2, 0.3),
        (tmp_path / "data" / "test" / "good", 0.8, 0.9),
        (tmp_path / "null" / "test" / "good", 0.8, 0.9),
        (tmp_path / "null" / "test" / "swap-null", 0.8, 0.9),  # null controls change nothing
    ):
        images = [read(path) for path in sorted(folder.iterdir())]
        assert images
        for image in images:
            assert image.min() >= np.floor(255 * low) and image.max() <= np.ceil(255 * high)


def test_crops_are_real_squares():
    y, x = np.mgrid[:200, :300] / 500.0
    seen = set()
    for seed in range(40):
        image = demo.crop(rng(seed), x, 64)
        step = np.diff(image[:, 2:-2], axis=1) * 500  # pixels of the photograph for one of the crop
        assert image.shape == (64, 64) and np.ptp(np.sign(step)) == 0
        seen.add(bool(step.mean() < 0))
        assert 0.73 < abs(step.mean()) <= 1.125
        upright = np.diff(demo.crop(rng(seed), y, 64)[2:-2], axis=0) * 500
        assert upright.mean() == pytest.approx(abs(step.mean()), rel=0.01)
    assert seen == {True, False}


def test_layout_is_read_back(tmp_path):
    write(tmp_path)
    data, null = str(tmp_path / "data"), str(tmp_path / "null")
    assert mvtec_train(data).endswith("good")
    kinds = [f"{kind}-{contrast}" for kind in demo.STRENGTHS for contrast in ("high", "low")]
    tests = mvtec_test(data)
    assert [t.defect for t in tests] == sorted([*kinds * 2, *["good"] * 6])
    assert {t.defect for t in mvtec_test(null)} == {"good", *(f"{k}-null" for k in demo.STRENGTHS)}
    for test in [*tests, *mvtec_test(null)]:
        mask = read_mask(test.mask_path, test.path)
        assert mask.shape == (64, 64) and mask.any() == (test.defect != "good")


def test_a_seed_is_a_data_set(tmp_path):
    for name, options in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("longer", {"test": 3})):
        write(tmp_path / name, **options)
    a, b, c, longer = (digests(tmp_path / name) for name in ("a", "b", "c", "longer"))
    assert a == b
    assert not set(a.values()) & set(c.values())
    assert a.items() <= longer.items()


@pytest.mark.parametrize("kind", demo.STRENGTHS)
def test_defects_change_what_the_mask_says(kind, photos):
    photo, others = photos["gravel"], [photos["brick"], photos["grass"]]
    for seed in range(20):
        image = demo.crop(rng(seed), photo, 128)
        strengths = demo.STRENGTHS[kind]
        made = {
            contrast: demo.add_defect(rng(seed), image, kind, strength, photo.std(), others)
            for contrast, strength in strengths.items()
        }
        (high, mask), (low, low_mask), (null, null_mask) = (
            made[contrast] for contrast in ("high", "low", "null")
        )
        # One draw for every strength: only the amplitude differs.
        assert np.array_equal(mask, low_mask) and np.array_equal(mask, null_mask)
        assert 0 < mask.mean() < 0.2
        assert np.array_equal(null, image)
        change, weak = np.abs(high - image), np.abs(low - image)
        grown = np.pad(mask, 2)
        near = sum(np.roll(grown, (y, x), (0, 1)) for y in range(-2, 3) for x in range(-2, 3))
        assert not change[near[2:-2, 2:-2] == 0].any()
        assert change[mask].mean() > 3 * change[~mask].mean()
        assert weak[mask].mean() < change[mask].mean()
        for changed in (high, low):
            assert changed.min() >= 0 and changed.max() <= 1
        if kind != "swap":  # the stated amplitude, where the range of values leaves it whole
            highest = change[(high > 0) & (high < 1)].max()
            assert 0.95 < highest / (2.5 * photo.std()) < 1 + 1e-9


def test_swapped_patches_keep_mean_and_contrast(photos, monkeypatch):
    image = demo.crop(rng(1), photos["gravel"], 128)
    everywhere = np.ones((128, 128))
    monkeypatch.setattr(demo, "blob_shape", lambda *args: everywhere)
    changed, _ = demo.add_defect(rng(2), image, "swap", 1.0, 0.1, [photos["grass"]])
    assert abs(np.corrcoef(changed.ravel(), image.ravel())[0, 1]) < 0.2
    # Up to the few values that leave the range.
    assert changed.mean() == pytest.approx(image.mean(), abs=0.01)
    assert changed.std() == pytest.approx(image.std(), rel=0.03)


def test_places_of_masks():
    ys, xs = [], []
    for seed in range(1000):
        y, x = np.nonzero(demo.blob_shape(rng(seed), 64, 0.05, 0.09) > 0.5)
        ys.append(y.mean())
        xs.append(x.mean())
    for centres in (ys, xs):
        share, _ = np.histogram(centres, bins=4, range=(0.15 * 64, 0.85 * 64))
        assert share.sum() > 900 and share.min() > 190


def test_the_whole_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SIZES", {"side": 32, "train": 40, "test": 2})
    result = demo.run(tmp_path / "out" / "demo", steps=2, device="cpu")
    out = tmp_path / "out" / "demo"
    names = {"data", "null", "report", "figures.json", "model.diffad", "overview.png"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "figures.json").read_text()) == result
    assert [row["contrast"] for row in result["by_kind"]] == ["high", "low", "null"] * 3
    assert result["overall"]["n_anomalous"] == 12  # null controls do not count
    for row in result["by_kind"]:
        assert 0 <= row["image_auroc"] <= 1
    assert len(demo.table(result).splitlines()) == 1 + 9 + 1
    with Image.open(out / "overview.png") as image:
        assert image.height > image.width
    with pytest.raises(InputError, match="model.diffad"):
        demo.run(out / "model.diffad", steps=1)


def test_errors_are_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert demo.main(["--out", str(tmp_path / "out"), "--steps", "-1"]) == 2
    assert "train_steps" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert demo.main(["--out", str(tmp_path / "out")]) == 2
    assert "pip install scikit-image" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
