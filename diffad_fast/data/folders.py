"""Files below a folder, what of a folder is no training data, and tables that tell it."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator

from ..errors import InputError

# What the folder of the normals is called.
NORMAL_FOLDERS = ("good", "normal", "ok")
# Of data sets, MVTec AD, MVTec AD 2 and VisA: what is in them is not all normal.
_TEST_FOLDERS = frozenset(
    ("test", "ground_truth", "test_public", "test_private", "test_private_mixed", "Anomaly")
)


def is_path(value) -> bool:
    """Whether it may name a file or folder."""
    return isinstance(value, (str, os.PathLike)) or (isinstance(value, bytes) and 0 not in value)


def is_open_file(value) -> bool:
    """Whether it is read itself, as ``io.BytesIO`` and what ``open`` gives."""
    return hasattr(value, "read") and not isinstance(value, os.PathLike)


def files_below(source: str, wanted: Callable[[str], bool]) -> list[str]:
    """``source`` itself if it is a file, else the files below it whose bare names are wanted,
    sorted; hidden folders and those of masks, ground_truth, are left out, links to folders
    followed. Raises InputError if it is neither file nor folder, or a folder cannot be read."""
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        raise InputError(f"{source} is no file or folder: check the path.")
    found = []
    for folder, below, names in _visible(source):
        below[:] = [name for name in below if name != "ground_truth"]
        found += [os.path.join(folder, name) for name in names if wanted(name)]
    # Broken links are named when they are read.
    return sorted(path for path in found if not _is_special(path))


def check_regular(path: str) -> None:
    """Raise InputError for a pipe or a device, also at the end of a link: it would be waited for.
    What is not there or is a folder fails by itself."""
    if _is_special(path):
        raise InputError(f"{path} is a pipe or a device: give a file with its content.")


def files_of_kinds(test: str, wanted: Callable[[str], bool], samples: str) -> dict[str, list[str]]:
    """The files below each folder of `test`, which are named after what they hold, as `files_below`
    finds them. Raises InputError for wanted files in none of the folders, and if there are none.

    samples: what the files are, in the plural.
    """
    _, kinds, names = next(_visible(test), (test, [], []))
    loose = sum(map(wanted, names))
    if loose:
        raise InputError(
            f"{test} itself holds {samples} ({loose}), and nothing tells whether they are normal: "
            f"move them to folders, such as {os.path.join(test, 'good')}."
        )
    folders = {kind: os.path.join(test, kind) for kind in kinds if kind != "ground_truth"}
    found = {kind: files_below(folder, wanted) for kind, folder in folders.items()}
    if not any(found.values()):
        raise InputError(
            f"{test} holds no {samples}: it needs folders of {samples}, such as "
            f"{os.path.basename(test)}/good."
        )
    return found


def check_no_test(root: str, samples: str) -> None:
    """Raise InputError if a folder of tests, such as test or ground_truth, lies below `root`, or a
    link leads to one or into one, or if `root` is one itself, with a folder of normals beside
    others: it is no training data.

    samples: what the detector sees, in the plural.
    """
    for folder, below, _ in _visible(root):
        for name in below:
            path, names = os.path.join(folder, name), [name]
            if os.path.islink(path):
                target = os.path.realpath(path)
                names += os.path.relpath(target, os.path.realpath(root)).split(os.sep)
                path = f"{path}, a link to {target},"
            if not _TEST_FOLDERS.isdisjoint(names):
                raise InputError(
                    f"{path} lies in {root}, and a detector is not trained on what it is tested "
                    f"on: give the folder of normal {samples}."
                )
    _, below, _ = next(_visible(root), (root, [], []))
    normal = [name for name in below if name in NORMAL_FOLDERS]
    if 0 < len(normal) < len(below):
        raise InputError(
            f"{root} holds defects beside normal {samples}: give {os.path.join(root, normal[0])}, "
            "or the root of the data set."
        )


def read_table(path: str | os.PathLike, columns: set[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that tells of samples. Raises InputError if it is not in UTF-8, lacks
    one of the columns or has a row without a value for each of them."""
    try:
        # Spreadsheets put a mark in front.
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not in UTF-8: convert it.") from None
    if not rows or not columns <= set(rows[0]):
        raise InputError(f"{path} lacks one of the columns {', '.join(sorted(columns))}.")
    for number, row in enumerate(rows, 1):
        if any(row[name] is None for name in columns):
            raise InputError(f"row {number} of {path} is too short: complete or remove it.")
    return rows


def _visible(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk``, without hidden folders, and links to folders are followed. A folder that is
    reached in several ways is seen once: by its own name, where it lies below ``root``. Nothing of
    a ``root`` that is no folder; raises InputError for a folder that cannot be read."""
    seen, tops = set(), [root] if os.path.isdir(root) else []
    while tops:
        links = []
        for top in tops:
            for folder, below, names in os.walk(top, onerror=_refuse):
                status = os.stat(folder)
                place = status.st_dev, status.st_ino
                if place in seen:
                    below[:] = []
                    continue
                seen.add(place)
                below[:] = sorted(name for name in below if not name.startswith("."))
                yield folder, below, names
                paths = [os.path.join(folder, name) for name in below]
                links += [path for path in paths if os.path.islink(path)]
        tops = links


def _is_special(path: str) -> bool:
    """Whether something is there that is neither file nor folder."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def _refuse(error: OSError) -> None:
    """For a folder that ``os.walk`` would leave out without a word."""
    raise InputError(
        f"{error.filename} cannot be read ({error.strerror}): check its permissions, or move it."
    ) from error
