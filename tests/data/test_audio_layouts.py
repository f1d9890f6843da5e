from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from recordings import save, tone

import diffad_fast as daf
from diffad_fast.data.audio import groups_by_recording, labelled_clips, training_clips
from diffad_fast.errors import InputError


@pytest.fixture
def urban(tmp_path) -> str:
    lines = ["slice_file_name,fsID,fold,classID,class"]
    for fold, name, number in ((1, "siren", 8), (1, "drilling", 4), (2, "siren", 8), (2, "dog", 3)):
        path = save(tmp_path / "audio" / f"fold{fold}" / f"{fold}-{number}-0-0.wav", tone(0.1))
        lines.append(f"{os.path.basename(path)},{fold},{fold},{number},{name}")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "UrbanSound8K.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path)


def test_urbansound8k(urban):
    for normal in ("siren", "8", 8):
        clips = labelled_clips(urban, normal=normal, folds=[2])
        assert [(c.kind, c.anomaly) for c in clips] == [("siren", False), ("dog", True)]
        assert all(os.path.isfile(clip.path) for clip in clips)
    assert len(labelled_clips(urban, "urbansound8k", "siren")) == 4
    (clip,) = training_clips(urban, normal="siren", folds=[1])
    assert clip.path.endswith(os.path.join("fold1", "1-8-0-0.wav"))
    assert clip.recording == "1" and not clip.anomaly
    for options, message in (
        ({}, "normal class is None: choose one of dog, drilling, siren, .*--normal"),
        ({"normal": "cat"}, "normal class is 'cat'"),
        ({"normal": "siren", "folds": [3]}, "no fold 3"),
        ({"normal": "siren", "layout": "mp3"}, "unknown layout 'mp3'"),
    ):
        with pytest.raises(InputError, match=message):
            labelled_clips(urban, **options)
    Path(urban, "metadata", "UrbanSound8K.csv").write_text("name\nx\n")
    with pytest.raises(InputError, match="lacks one of the columns"):
        labelled_clips(urban, normal="siren")


def test_no_class_of_urbansound8k_is_normal_unless_named(urban):
    detector = daf.Detector(kind="audio")
    with pytest.raises(InputError, match="UrbanSound8K layout .* --layout urbansound8k --normal"):
        detector.fit(urban)
    with pytest.raises(InputError, match="1 usable"):  # more are needed, and it counts them
        detector.fit([c.path for c in training_clips(urban, normal="siren", folds=[1])])
    with pytest.raises(InputError, match="1 usable"):
        detector.fit(urban, normal="siren", folds=[1])
    with pytest.raises(InputError, match="layout, normal and folds .* the data is a list"):
        detector.fit([urban], normal="siren")


def test_clips_of_one_recording_are_one_group(urban):
    clips = labelled_clips(urban, normal="siren")
    assert groups_by_recording(clips) == ["1", "1", "2", "2"]
    assert groups_by_recording(clips[::2]) is None  # one of each


def test_dcase(tmp_path):
    for part, name in (
        ("train", "section_00_source_train_normal_0000_x.wav"),
        ("test", "section_00_source_test_normal_0000.wav"),
        ("test", "section_00_target_test_anomaly_0001.wav"),
        ("test", "section_01_target_test_normal_0002.wav"),
    ):
        save(tmp_path / part / name, tone(0.1))
    (tmp_path / "test" / "readme.wav").write_bytes(b"")
    found = [clip[1:5] for clip in labelled_clips(tmp_path)]
    assert found == [
        ("normal", False, "00", "source"),
        ("anomaly", True, "00", "target"),
        ("normal", False, "01", "target"),
    ]
    assert [os.path.basename(c.path) for c in training_clips(tmp_path)] == [
        "section_00_source_train_normal_0000_x.wav"
    ]
    with pytest.raises(InputError, match="this is dcase"):
        training_clips(tmp_path, normal="fan")


def test_dcase_of_2020(tmp_path):
    for name in (
        "train/normal_id_00_00000000", "test/normal_id_00_00000001", "test/anomaly_id_02_00000000",
    ):  # fmt: skip
        save(tmp_path / f"{name}.wav", tone(0.1))
    assert [clip[1:5] for clip in labelled_clips(tmp_path)] == [
        ("anomaly", True, "02", "source"), ("normal", False, "00", "source")
    ]  # fmt: skip
    (clip,) = training_clips(tmp_path)
    assert os.path.basename(clip.path) == "normal_id_00_00000000.wav"


def test_plain_folders(tmp_path):
    for name in ("train/normal/0", "test/normal/1", "test/knock/2", "test/hiss/3"):
        save(tmp_path / f"{name}.wav", tone(0.1))
    found = [(clip.kind, clip.anomaly) for clip in labelled_clips(tmp_path)]
    assert found == [("hiss", True), ("knock", True), ("normal", False)]
    for folder, name in (("", "train/normal/0.wav"), ("test/hiss", "test/hiss/3.wav")):
        clips = training_clips(tmp_path / folder)
        assert [clip.path for clip in clips] == [str(tmp_path / name)]
        assert groups_by_recording(clips) is None
    with pytest.raises(InputError, match="has no folder test"):
        labelled_clips(tmp_path / "train")
    with pytest.raises(InputError, match="is not a folder"):
        labelled_clips(tmp_path / "absent")


def test_recordings_of_the_test_in_deeper_folders_are_evaluated_too(tmp_path):
    names = ["bad/0.wav", "bad/m1/1.wav", "good/m1/day/2.wav"]
    for name in names:
        save(tmp_path / "test" / name, tone(0.1))
    save(tmp_path / "test" / ".hidden" / "3.wav", tone(0.1))
    clips = labelled_clips(tmp_path)
    assert [(os.path.relpath(c.path, tmp_path / "test"), c.kind) for c in clips] == [
        (name, name.split("/")[0]) for name in names
    ]
    for name in "45":
        save(tmp_path / "test" / f"{name}.wav", tone(0.1))
    with pytest.raises(InputError, match=r"/test itself holds recordings \(2\), .*: move"):
        labelled_clips(tmp_path)


def test_training_never_takes_a_test_folder(tmp_path):
    root = tmp_path / "machine"
    for name in ("test/anomaly_1.wav", "train/normal_1.wav", "train/deep/normal_2.wav"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        save(root / name, tone())
    names = [os.path.relpath(clip.path, root) for clip in training_clips(root)]
    assert names == ["train/deep/normal_2.wav", "train/normal_1.wav"]
    shutil.rmtree(root / "train")
    for folder in (root, tmp_path):
        with pytest.raises(InputError, match="test lies in .*: give the folder of normal rec"):
            training_clips(folder)


@pytest.mark.parametrize("folder", ["test", "recordings"])
def test_anomalies_beside_normals_are_not_trained_on(tmp_path, folder):
    root = tmp_path / folder
    for name in ("good/0", "bad/1"):
        save(root / f"{name}.wav", tone(0.1))
    message = f"^{root} holds defects beside normal recordings: give {root / 'good'}, or the root"
    with pytest.raises(InputError, match=message):
        training_clips(root)
    assert len(training_clips(root / "good")) == len(training_clips(root / "bad")) == 1
    (root / "bad").rename(root / "ok")
    assert len(training_clips(root)) == 2


@pytest.mark.parametrize("name", ["section_00_source_test_{}_0000", "{}_id_02_00000000"])
def test_recordings_that_dcase_names_anomalies_are_not_trained_on(tmp_path, name):
    save(tmp_path / "test" / f"{name.format('normal')}.wav", tone(0.1))
    assert len(training_clips(tmp_path / "test")) == 1
    anomaly = save(tmp_path / "test" / f"{name.format('anomaly')}.wav", tone(0.1))
    with pytest.raises(InputError, match=f"^{anomaly} is an anomaly by its name"):
        training_clips(tmp_path / "test")


def test_bad_metadata_is_named(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "audio").mkdir()
    table = tmp_path / "metadata" / "a.csv"
    head = "slice_file_name,fsID,fold,classID,class\n"
    table.write_bytes(head.encode() + "a.wav,1,1,0,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(InputError, match="a.csv is not in UTF-8"):
        labelled_clips(tmp_path, normal="0")
    table.write_text(head + "a.wav,1,1,0,horn\nb.wav,2,1\n")
    with pytest.raises(InputError, match="row 2 of .*a.csv is too short"):
        labelled_clips(tmp_path, normal="horn")
    table.write_text(head + "a.wav,1,1,0,horn\nb.wav,2,2,1,dog\n")
    with pytest.raises(InputError, match="no clip of dog in fold 1"):
        training_clips(tmp_path, normal="dog", folds=[1])
