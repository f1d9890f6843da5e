"""Data sets in the MVTec AD layout: train/good, test/<defect>, ground_truth/<defect>; also in those
of MVTec LOCO AD, whose masks lie in a folder for each image, and of MVTec AD 2, whose test folder
is test_public.

A folder "normal", or "ok" as in BTAD, in place of "good" will do.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ..errors import InputError
from .folders import NORMAL_FOLDERS, check_no_test, files_below, files_of_kinds
from .image_files import is_image


class TestImage(NamedTuple):
    """One test image.

    `defect` is "good", or what the defect is called, such as its folder; `mask_path` is the ground
    truth, a file or a folder of masks whose union counts; None for a good image and where there are
    no masks. Figures of pixels need those of all defects.
    """

    __test__ = False  # pytest would collect the class by its name

    path: str
    defect: str
    mask_path: str | None


def mvtec_train(root: str | bytes | os.PathLike) -> str:
    """What to train on of a folder: `root/train/good`, `root/train/normal` or `root/train/ok`, or
    all of `root` where none of them is there.

    Raises:
        InputError: somewhere below it is a folder of test images or masks, or it is one itself,
            with normal images beside defects.
    """
    root = os.fsdecode(root)
    parts = [os.path.join(root, "train", name) for name in NORMAL_FOLDERS]
    folder = next(filter(os.path.isdir, parts), root)
    check_no_test(folder, "images")
    return folder


def mvtec_test(root: str | bytes | os.PathLike, layout: str = "mvtec") -> list[TestImage]:
    """The test images of a data set, sorted by defect and name.

    Images are all below `root/test/<defect>`; masks are `root/ground_truth/<defect>/<stem>_mask.*`
    or `<stem>.*`, in the layout "mvtec_loco" all of `<stem>/*`; those of an image in a deeper
    folder lie as deep. In "mvtec_ad2" both lie in `root/test_public`. A data set without a folder
    `ground_truth` has no masks.

    Raises:
        InputError: there is no folder `test` with folders of images in it, images lie beside
            these, or a mask is missing.
    """
    root = os.fsdecode(root)
    public = layout == "mvtec_ad2"
    test = os.path.join(root, "test_public" if public else "test")
    truth = os.path.join(test if public else root, "ground_truth")
    if not os.path.isdir(test):
        raise InputError(
            f"{root} has no folder {os.path.basename(test)}: evaluation needs the folder of one "
            "category in the layout of MVTec AD (test/good, test/<defect>, ground_truth/<defect>), "
            "BTAD, MVTec LOCO AD, MVTec AD 2 or VisA, or a list of data.mvtec.TestImage."
        )
    list_masks, mask_name = _masks, "{}_mask.png"
    if layout == "mvtec_loco":
        list_masks, mask_name = _folders_of_masks, os.path.join("{}", "000.png")
    found: list[TestImage] = []
    for defect, paths in files_of_kinds(test, is_image, "images").items():
        folder, good = os.path.join(test, defect), defect in NORMAL_FOLDERS
        need_mask = not good and os.path.isdir(truth)
        masks = list_masks(os.path.join(truth, defect)) if need_mask else {}
        for path in paths:
            stem = os.path.splitext(os.path.relpath(path, folder))[0]
            mask = masks.get(f"{stem}_mask", masks.get(stem))
            if need_mask and mask is None:
                missing = os.path.join(truth, defect, mask_name.format(stem))
                raise InputError(
                    f"{path} has no mask: {missing} is missing; add it, or remove the whole folder "
                    "ground_truth."
                )
            found.append(TestImage(path, "good" if good else defect, mask))
    return found


def image_names(folder: str) -> list[str]:
    """Those below it, by their names from there."""
    paths = files_below(folder, is_image) if os.path.isdir(folder) else []
    return [os.path.relpath(path, folder) for path in paths]


def _masks(folder: str) -> dict[str, str]:
    return {os.path.splitext(name)[0]: os.path.join(folder, name) for name in image_names(folder)}


def _folders_of_masks(folder: str) -> dict[str, str]:
    names = map(os.path.dirname, image_names(folder))
    return {name: os.path.join(folder, name) for name in names}
