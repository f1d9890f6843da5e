"""Data sets in the MVTec AD layout: train/good, test/<defect>, ground_truth/<defect>.

A folder "normal" in place of "good" will do.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ..errors import InputError
from .folders import NORMAL_FOLDERS, check_no_test
from .image_files import is_image


class TestImage(NamedTuple):
    """One test image in the MVTec AD layout.

    `defect` is "good", or what the defect is called, such as its folder; `mask_path` is the ground
    truth, None for a good image and where there are no masks. Figures of pixels need those of all
    defects.
    """

    __test__ = False  # pytest would collect the class by its name

    path: str
    defect: str
    mask_path: str | None


def mvtec_train(root: str | bytes | os.PathLike) -> str:
    """What to train on of a folder: `root/train/good` or `root/train/normal`, or all of `root`
    where neither is there.

    Raises:
        InputError: somewhere below it is a folder test or ground_truth.
    """
    root = os.fsdecode(root)
    parts = [os.path.join(root, "train", name) for name in NORMAL_FOLDERS]
    folder = next(filter(os.path.isdir, parts), root)
    check_no_test(folder, "images")
    return folder


def mvtec_test(root: str) -> list[TestImage]:
    """The test images of a data set in the MVTec AD layout, sorted by defect and name.

    Images are `root/test/<defect>/*`; masks are `root/ground_truth/<defect>/<stem>_mask.*` or
    `<stem>.*`. A data set without a folder `ground_truth` has no masks.

    Raises:
        InputError: there is no folder `test` with images in it, or a mask is missing.
    """
    root = os.fsdecode(root)
    test, truth = os.path.join(root, "test"), os.path.join(root, "ground_truth")
    if not os.path.isdir(test):
        raise InputError(
            f"{root} has no folder test: evaluation needs the MVTec AD layout, test/good and "
            "test/<defect> with masks in ground_truth/<defect>, or a list of data.mvtec.TestImage."
        )
    found: list[TestImage] = []
    for defect in sorted(os.listdir(test)):
        folder = os.path.join(test, defect)
        if defect.startswith(".") or not os.path.isdir(folder):
            continue
        good = defect in NORMAL_FOLDERS
        need_mask = not good and os.path.isdir(truth)
        masks = _masks(os.path.join(truth, defect)) if need_mask else {}
        for name in sorted(filter(is_image, os.listdir(folder))):
            path, stem = os.path.join(folder, name), os.path.splitext(name)[0]
            mask = masks.get(f"{stem}_mask", masks.get(stem))
            if need_mask and mask is None:
                raise InputError(
                    f"{path} has no mask: {os.path.join(truth, defect, stem + '_mask.png')} is "
                    "missing; add it, or remove the whole folder ground_truth."
                )
            found.append(TestImage(path, "good" if good else defect, mask))
    if not found:
        raise InputError(f"{test} holds no images: it needs folders of images, such as test/good.")
    return found


def _masks(folder: str) -> dict[str, str]:
    names = sorted(filter(is_image, os.listdir(folder))) if os.path.isdir(folder) else []
    return {os.path.splitext(name)[0]: os.path.join(folder, name) for name in names}
