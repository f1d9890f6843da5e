"""Data sets for `python -m benchmarks quality`: what is trained on, tested, chosen on, reported."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffad_fast.data.image_layouts import is_data_set, labelled_images, training_images
from diffad_fast.data.images import open_images
from diffad_fast.data.mvtec import TestImage
from diffad_fast.errors import InputError

# Options are chosen on these tables and categories; figures are quoted on all others...
DEV_NAMES = (
    "annthyroid", "breastw", "cardio", "fault", "optdigits", "pendigits", "bottle", "cable",
    "carpet",
)  # fmt: skip
# ...but these of ADBench: all of their rows stand in a dev table, thyroid's with each column scaled
# to 0 to 1.
STANDS_IN = {"thyroid": "annthyroid", "WBC": "breastw"}


@dataclass(frozen=True)
class DataSet:
    """Normal samples, test samples and what is known of both.

    train, test: what ``Detector`` takes. groups, test_groups: the object behind each sample, None
    where each is one. label (N,): 1 for an anomaly. part (N,): "dev" or "report" of each test
    sample. tests: the images with their masks, None for vectors. stands_in: the dev table that
    holds all rows of this one.
    """

    name: str
    kind: str
    train: object
    test: object
    label: np.ndarray
    part: np.ndarray
    groups: Sequence | None = None
    test_groups: Sequence | None = None
    tests: list[TestImage] | None = None
    stands_in: str | None = None


def find(path: Path, size: int, channels: int, number: str | None, gap: int) -> list[DataSet]:
    """The data sets below ``path``: one in a layout of ``data.image_layouts``, a folder of those,
    or a folder of .npz tables with X and y.

    number, gap: a regular expression whose first parenthesis is a number in the names of image
    files; sorted by it, a step of more than ``gap`` begins a new object. Raises InputError for
    another folder, and where a name has no such number.
    """
    if is_data_set(path):
        return [_images(path, size, channels, number, gap)]
    roots = sorted(p for p in path.iterdir() if is_data_set(p))
    if roots:
        return [_images(root, size, channels, number, gap) for root in roots]
    tables = sorted(path.glob("*.npz"))
    if not tables:
        raise InputError(f"{path} holds neither images in a known layout nor .npz tables")
    return [_table(table) for table in tables]


def _images(root: Path, size: int, channels: int, number: str | None, gap: int) -> DataSet:
    train = open_images(training_images(root), (size, size), channels)
    tests = labelled_images(root)
    paths = [test.path for test in tests]
    return DataSet(
        name=root.name,
        kind="image",
        train=train,
        test=open_images(paths, (size, size), channels, strict=True),
        label=np.array([test.defect != "good" for test in tests], dtype=np.int64),
        part=np.array([part_of(path) for path in paths]),
        groups=objects(train.paths, number, gap) if number else None,
        test_groups=objects(paths, number, gap) if number else None,
        tests=tests,
    )


def part_of(path: str) -> str:
    """ "dev" or "report", by the file's name alone."""
    even = hashlib.sha256(Path(path).stem.encode()).digest()[-1] % 2 == 0
    return "dev" if even else "report"


def objects(paths: Sequence[str], number: str, gap: int) -> list[int]:
    """The object that each file shows."""
    numbers = [_number(Path(path).name, number) for path in paths]
    found, current, before = {}, 0, None
    for n in sorted(set(numbers)):
        current += before is not None and n - before > gap
        found[n], before = current, n
    return [found[n] for n in numbers]


def _number(name: str, pattern: str) -> int:
    try:
        return int(re.search(pattern, name)[1])
    except (TypeError, IndexError, ValueError):  # no match, no parenthesis, no number in it
        raise InputError(
            f"the first parenthesis of --group-number {pattern!r} is no number in {name}"
        ) from None


def _table(path: Path) -> DataSet:
    """Half of the normals, drawn with seed 0, are trained on; the rest is the test."""
    with np.load(path, allow_pickle=False) as content:
        rows, label = content["X"].astype(np.float32), content["y"].astype(np.int64).reshape(-1)
    normal = np.random.default_rng(0).permutation(np.flatnonzero(label == 0))
    half = len(normal) // 2
    test = np.concatenate([normal[half:], np.flatnonzero(label == 1)])
    name = re.sub(r"^\d+_", "", path.stem)
    stands_in = STANDS_IN.get(name)
    dev = stands_in or any(name.lower().endswith(known.lower()) for known in DEV_NAMES)
    return DataSet(
        name=name,
        kind="vector",
        train=rows[normal[:half]],
        test=rows[test],
        label=label[test],
        part=np.full(len(test), "dev" if dev else "report"),
        stands_in=stands_in,
    )
