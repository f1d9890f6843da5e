from __future__ import annotations

import os
from pathlib import Path

import pytest
from pictures import mvtec, pixels, save

from diffad_fast.data.image_files import read_mask
from diffad_fast.data.image_layouts import labelled_images
from diffad_fast.data.mvtec import mvtec_test, mvtec_train
from diffad_fast.errors import InputError


def test_mvtec_layout(tmp_path):
    root = mvtec(tmp_path)
    assert mvtec_train(root) == str(root / "train/good")
    assert mvtec_train(root / "train/good") == str(root / "train/good")
    assert mvtec_train(root / "test/good") == str(root / "test/good")
    with pytest.raises(InputError, match="test holds defects beside normal images: give .*good"):
        mvtec_train(root / "test")
    (root / "test").rename(root / "other")
    with pytest.raises(InputError, match="other holds defects beside normal images: give .*good"):
        mvtec_train(root / "other")
    (root / "other").rename(root / "test")
    found = mvtec_test(root)
    assert [(Path(t.path).name, t.defect) for t in found] == [
        ("0.png", "good"), ("0.png", "hole"), ("1.jpg", "hole")
    ]  # fmt: skip
    truth = root / "ground_truth" / "hole"
    masks = [None, str(truth / "0_mask.png"), str(truth / "1.bmp")]
    assert [t.mask_path for t in found] == masks
    assert not read_mask(found[0].mask_path, found[0].path).any()
    for test in found[1:]:
        mask = read_mask(test.mask_path, test.path)
        assert mask.dtype == bool and mask.shape == (40, 24) and mask.sum() == 21


@pytest.mark.parametrize("folder", ["test", "ground_truth", "a/b/test", "train/ground_truth"])
def test_a_test_set_is_not_trained_on(tmp_path, folder):
    for name in ("0.png", "train/bad/1.png", ".cache/test/2.png", "tests/3.png"):
        save(tmp_path / name, pixels())
    assert mvtec_train(tmp_path) == mvtec_train(os.fsencode(tmp_path)) == str(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"^{tmp_path / folder} lies in {tmp_path}, and.*normal"):
        mvtec_train(tmp_path)
    (tmp_path / "train/good").mkdir(parents=True, exist_ok=True)
    assert mvtec_train(tmp_path) == str(tmp_path / "train/good")


def test_mvtec_without_masks_or_anomalies(tmp_path):
    save(tmp_path / "test/good/0.png", pixels())
    assert [t.defect for t in mvtec_test(tmp_path)] == ["good"]
    save(tmp_path / "test/hole/0.png", pixels())
    assert [t.mask_path for t in mvtec_test(tmp_path)] == [None, None]


def test_normal_stands_for_good(tmp_path):
    for name in ("train/normal/0.png", "test/normal/1.png", "test/hole/2.png"):
        save(tmp_path / name, pixels())
    save(tmp_path / "ground_truth/hole/2.png", pixels())
    assert mvtec_train(tmp_path) == str(tmp_path / "train/normal")
    found = [(test.defect, test.mask_path is None) for test in mvtec_test(tmp_path)]
    assert found == [("hole", False), ("good", True)]


@pytest.mark.parametrize("layout, mask", [("mvtec", "1_mask.png"), ("mvtec_loco", "1/000.png")])
def test_images_in_deeper_folders_have_the_masks_of_these(tmp_path, layout, mask):
    for name in ("test/good/day/0.png", "test/hole/day/1.png", "test/hole/night/1.png"):
        save(tmp_path / name, pixels())
    masks = [tmp_path / "ground_truth/hole" / day / mask for day in ("day", "night")]
    for path in masks:
        save(path, pixels())
    found = mvtec_test(tmp_path, layout)
    assert layout == "mvtec_loco" or labelled_images(tmp_path) == found
    assert [test.defect for test in found] == ["good", "hole", "hole"]
    wanted = masks if layout == "mvtec" else [path.parent for path in masks]
    assert [test.mask_path for test in found[1:]] == list(map(str, wanted))


def test_mvtec_errors(tmp_path):
    with pytest.raises(InputError, match="no folder test"):
        mvtec_test(tmp_path)
    (tmp_path / "test" / "good").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        mvtec_test(tmp_path)
    root = mvtec(tmp_path)
    (root / "ground_truth/hole/1.bmp").unlink()
    with pytest.raises(InputError, match=r"1\.jpg has no mask: .*1_mask\.png"):
        mvtec_test(root)
    save(root / "test/0.png", pixels())
    with pytest.raises(InputError, match=r"/test itself holds images \(1\), .*: move"):
        mvtec_test(root)
