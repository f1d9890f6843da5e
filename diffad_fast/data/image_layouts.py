"""Layouts of data sets of images: MVTec AD and BTAD, MVTec LOCO AD, MVTec AD 2, VisA."""

from __future__ import annotations

import os

from ..errors import InputError
from .folders import read_table
from .mvtec import TestImage, image_names, mvtec_test, mvtec_train

LAYOUTS = ("auto", "mvtec", "mvtec_loco", "mvtec_ad2", "visa")
_VISA_LABELS = {"normal": "good", "anomaly": "anomaly"}


def training_images(root: str | bytes | os.PathLike, layout: str = "auto") -> str | list[str]:
    """The normal images to train on, a folder or files; arguments as in `labelled_images`.

    Of VisA the normal ones of the split "train", else root/train/good, root/train/normal or
    root/train/ok; where "auto" finds none of them, all of root, which may be a single file too.

    Raises:
        InputError: as in `labelled_images`, and where a folder of test images or masks lies
            anywhere below what would be trained on.
    """
    root, asked = os.fsdecode(root), layout != "auto"
    layout = _layout(root, layout)
    if layout == "visa":
        return [image.path for image in _visa(root, "train") if image.defect == "good"]
    folder = mvtec_train(root)
    if asked and folder == root:
        raise InputError(
            f"{root} has no folder train/good: it is not in the layout {layout}; choose another, "
            "or give the folder of one category."
        )
    return folder


def labelled_images(root: str | bytes | os.PathLike, layout: str = "auto") -> list[TestImage]:
    """The test images of a data set with their masks, sorted by defect and name.

    Args:
        root: the folder of one category.
        layout: "mvtec", of MVTec AD and BTAD: test/<defect>, of which good, normal or ok holds the
            normals, and ground_truth/<defect>/<stem>_mask.* or <stem>.*. "mvtec_loco", of MVTec
            LOCO AD: the same with ground_truth/<defect>/<stem>/*, several masks of an image.
            "mvtec_ad2", of MVTec AD 2: test_public/<defect> and test_public/ground_truth/<defect>;
            its private tests have no labels. "visa", of VisA: Data/Images, Data/Masks and, beside
            the category's folder, split_csv/1cls.csv. "auto": what is found.

    Raises:
        InputError: the layout is unknown, or its folders, its table or a mask are not there.
    """
    root = os.fsdecode(root)
    found = _layout(root, layout)
    if found == "visa":
        return _visa(root, "test")
    if layout == "auto" and found == "mvtec" and _has_folders_of_masks(root):
        found = "mvtec_loco"
    return mvtec_test(root, found)


def is_data_set(root: str | os.PathLike) -> bool:
    """Whether a folder has labelled images in one of the layouts."""
    return _found(os.fsdecode(root)) is not None


def _layout(root: str, layout: str) -> str:
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}: choose {', '.join(LAYOUTS)}")
    if layout == "auto":
        return _found(root) or "mvtec"
    if not os.path.isdir(root):
        raise InputError(f"{root} is not a folder: give the root of a data set.")
    return layout


def _found(root: str) -> str | None:
    if os.path.isdir(os.path.join(root, "test")):
        return "mvtec"  # or mvtec_loco, which its masks tell
    if os.path.isdir(os.path.join(root, "test_public")):
        return "mvtec_ad2"
    visa = os.path.isdir(os.path.join(root, "Data", "Images", "Normal"))
    return "visa" if visa and not os.path.isdir(os.path.join(root, "train")) else None


def _has_folders_of_masks(root: str) -> bool:
    """Whether folders with the names of test images hold masks, and no file is the mask of one."""
    images, masks = (image_names(os.path.join(root, name)) for name in ("test", "ground_truth"))
    stems, files = ({os.path.splitext(name)[0] for name in names} for names in (images, masks))
    files |= {name.removesuffix("_mask") for name in files}
    return stems.isdisjoint(files) and any(os.path.dirname(name) in stems for name in masks)


def _visa(root: str, split: str) -> list[TestImage]:
    """One category's images of a split, by the table of the whole data set."""
    above, category = os.path.split(os.path.abspath(root))
    table, masks = os.path.join(above, "split_csv", "1cls.csv"), os.path.join(root, "Data", "Masks")
    if not os.path.isfile(table):
        raise InputError(
            f"{table} is missing: it tells which of VisA's images are for training; put the file "
            "split_csv/1cls.csv of the VisA download there."
        )
    rows = read_table(table, {"object", "split", "label", "image", "mask"})
    categories = {row["object"] for row in rows}
    if category not in categories:
        raise InputError(
            f"{table} has no category {category!r}: give the folder of one that it has, "
            f"{', '.join(sorted(categories))}."
        )
    found = []
    for number, row in enumerate(rows, 1):
        if (row["object"], row["split"]) != (category, split):
            continue
        if row["label"] not in _VISA_LABELS:
            raise InputError(
                f"row {number} of {table} has the label {row['label']!r}: it is to be normal or "
                "anomaly."
            )
        path, defect, mask = os.path.join(above, row["image"]), _VISA_LABELS[row["label"]], None
        if defect != "good" and os.path.isdir(masks):
            mask = os.path.join(above, row["mask"])
            if not os.path.isfile(mask):
                raise InputError(
                    f"{path} has no mask: {table} names {row['mask']!r}, which is missing; add it, "
                    f"or remove the whole folder {masks}."
                )
        found.append(TestImage(path, defect, mask))
    if not found:
        raise InputError(f"{table} has no images of {category} in the split {split}: replace it.")
    return sorted(found, key=lambda image: (image.defect, image.path))
