"""Layouts of data sets of recordings: UrbanSound8K, DCASE Task 2, plain folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .audio_files import audio_files, is_audio
from .folders import NORMAL_FOLDERS, check_no_test, files_of_kinds, read_table

LAYOUTS = ("auto", "folder", "urbansound8k", "dcase")
_DCASE_NAME = re.compile(
    r"section_(?P<section>\d+)_(?P<domain>source|target)_(train|test)_(?P<kind>normal|anomaly)_"
    r"|(?P<kind_2020>normal|anomaly)_id_(?P<machine>\d+)_"  # of 2020, which had one domain
)


class LabelledClip(NamedTuple):
    """One recording of a data set.

    `kind` names what it is: its class, its folder, "normal" or "anomaly"; `anomaly`: False for a
    normal one. `section`: the part of the test that is judged by itself, such as "00" of DCASE;
    "" where there is one. `domain`: "source" or "target" in DCASE, else "". `recording`: what the
    clip was cut from, by its number in UrbanSound8K; "" where every clip is a recording of its own.
    """

    path: str
    kind: str
    anomaly: bool
    section: str = ""
    domain: str = ""
    recording: str = ""


def training_clips(
    root: str, layout: str = "auto", normal: str | None = None, folds: Sequence[int] | None = None
) -> list[LabelledClip]:
    """The normal clips to train on; arguments and errors as in `labelled_clips`.

    A plain folder gives root/train/good, root/train/normal or root/train/ok, all of root/train, or
    all that it holds. Raises `InputError` where a folder of tests, such as test or ground_truth,
    lies anywhere below that, or it is one itself: with normals beside other folders, or with
    recordings that DCASE names anomalies.
    """
    root = os.fsdecode(root)
    layout = _layout(root, layout)
    if layout == "urbansound8k":
        clips = [c for c in _urbansound8k(root, normal, folds) if not c.anomaly]
        if not clips:
            where = ", ".join(map(str, folds))
            raise InputError(f"there is no clip of {normal} in fold {where} of {root}.")
        return clips
    _check_plain(layout, normal, folds)
    if layout == "dcase":
        return [c for c in _dcase(root, "train") if not c.anomaly]
    parts = [os.path.join(root, "train", name) for name in (*NORMAL_FOLDERS, "")]
    folder = next(filter(os.path.isdir, parts), root)
    check_no_test(folder, "recordings")
    paths = audio_files(folder)
    for path in paths:
        match = _DCASE_NAME.match(os.path.basename(path))
        if match and "anomaly" in match.group("kind", "kind_2020"):
            raise InputError(
                f"{path} is an anomaly by its name, and a detector is trained on normals: give the "
                "folder of normal recordings, or the root of the data set."
            )
    return [LabelledClip(path, "normal", False) for path in paths]


def groups_by_recording(clips: Sequence[LabelledClip]) -> list[str] | None:
    """The ``groups`` of ``Detector.fit``: clips cut from one recording resemble each other, and are
    to be held out together. None where every clip is a recording of its own."""
    groups = [clip.recording or clip.path for clip in clips]
    return groups if len(set(groups)) < len(groups) else None


def labelled_clips(
    root: str, layout: str = "auto", normal: str | None = None, folds: Sequence[int] | None = None
) -> list[LabelledClip]:
    """The labelled test recordings of a data set.

    Args:
        root: its folder.
        layout: "urbansound8k": audio/foldN and metadata/*.csv. "dcase", of one machine type in Task
            2: test/section_00_source_test_normal_*.wav, of 2020 test/normal_id_00_*.wav, and
            train/. "folder": all below test/good, test/normal or test/ok, and test/<kind> for each
            kind of anomaly. "auto": what is found.
        normal: the class that is normal in UrbanSound8K, by name or number; all others are
            anomalous. Only for that layout.
        folds: its folds, by number; None: all. Only for that layout.

    Raises:
        InputError: the layout, the class or the folds are not there, or recordings lie in test
            itself.
    """
    root = os.fsdecode(root)
    layout = _layout(root, layout)
    if layout == "urbansound8k":
        return _urbansound8k(root, normal, folds)
    _check_plain(layout, normal, folds)
    return _dcase(root, "test") if layout == "dcase" else _folders(root)


def _layout(root: str, layout: str) -> str:
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}: choose {', '.join(LAYOUTS)}")
    if not os.path.isdir(root):
        raise InputError(f"{root} is not a folder: give the root of a data set.")
    if layout != "auto":
        return layout
    if os.path.isdir(os.path.join(root, "metadata")) and os.path.isdir(os.path.join(root, "audio")):
        return "urbansound8k"
    for part in ("train", "test"):
        folder = os.path.join(root, part)
        if os.path.isdir(folder) and any(map(_DCASE_NAME.match, os.listdir(folder))):
            return "dcase"
    return "folder"


def _check_plain(layout: str, normal: str | None, folds: Sequence[int] | None) -> None:
    if normal is not None or folds is not None:
        raise InputError(
            f"a normal class and folds are for the layout urbansound8k, and this is {layout}: "
            "leave them out."
        )


def _urbansound8k(root: str, normal: str | None, folds: Sequence[int] | None) -> list[LabelledClip]:
    tables = sorted(Path(root, "metadata").glob("*.csv"))
    if not tables:
        raise InputError(f"{root} has no metadata/*.csv: it is not in the UrbanSound8K layout.")
    rows = read_table(tables[0], {"slice_file_name", "fsID", "fold", "classID", "class"})
    names = {row["classID"]: row["class"] for row in rows}
    normal = names.get(str(normal), normal)
    if normal not in names.values():
        raise InputError(
            f"{root} is in the UrbanSound8K layout and its normal class is {normal!r}: choose one "
            f"of {', '.join(sorted(names.values()))}, by normal=CLASS or from a shell by --layout "
            "urbansound8k --normal CLASS."
        )
    known = {row["fold"] for row in rows}
    wanted = known if folds is None else {str(fold) for fold in folds}
    if not wanted <= known:
        raise InputError(
            f"there is no fold {', '.join(sorted(wanted - known))}: {root} has {len(known)} folds."
        )
    return [
        LabelledClip(
            os.path.join(root, "audio", f"fold{row['fold']}", row["slice_file_name"]),
            row["class"],
            row["class"] != normal,
            recording=row["fsID"],
        )
        for row in rows
        if row["fold"] in wanted
    ]


def _dcase(root: str, part: str) -> list[LabelledClip]:
    folder = os.path.join(root, part)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [(name, match) for name in names if (match := _DCASE_NAME.match(name))]
    if not found:
        raise InputError(
            f"{folder} holds no section_NN_source_{part}_normal_* or normal_id_NN_*: it is not in "
            "the layout of DCASE Task 2."
        )
    clips = []
    for name, match in found:
        kind = match["kind"] or match["kind_2020"]
        section, domain = match["section"] or match["machine"], match["domain"] or "source"
        path = os.path.join(folder, name)
        clips.append(LabelledClip(path, kind, kind == "anomaly", section, domain))
    return clips


def _folders(root: str) -> list[LabelledClip]:
    test = os.path.join(root, "test")
    if not os.path.isdir(test):
        raise InputError(
            f"{root} has no folder test: evaluation needs test/good or test/normal, and "
            "test/<kind> for each kind of anomaly."
        )
    return [
        LabelledClip(path, kind, kind not in NORMAL_FOLDERS)
        for kind, paths in files_of_kinds(test, is_audio, "recordings").items()
        for path in paths
    ]
