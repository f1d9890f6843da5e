"""Trees of each layout, made up here: the paths, kinds and masks that are found in them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import mvtec, pixels, save
from sklearn.metrics import precision_recall_curve, roc_auc_score

import diffad_fast as daf
from diffad_fast import evaluation
from diffad_fast.data.audio import labelled_clips, training_clips
from diffad_fast.data.folders import check_no_test
from diffad_fast.data.image_files import read_mask
from diffad_fast.data.image_layouts import is_data_set, labelled_images, training_images
from diffad_fast.data.mvtec import TestImage, mvtec_train
from diffad_fast.data.sources import training_part
from diffad_fast.errors import InputError
from diffad_fast.evaluation import image_metrics
from diffad_fast.scoring import Score

SHAPE = (20, 16)
HEAD = "object,split,label,image,mask\n"


def make(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        save(root / name, pixels(i, SHAPE))
    return root


def btad(root: Path) -> Path:
    return make(
        root, "train/ok/0.bmp", "test/ok/1.bmp", "test/ko/2.bmp", "test/ko/3.png",
        "ground_truth/ko/2.png", "ground_truth/ko/3.bmp",
    )  # fmt: skip


def loco(root: Path) -> Path:
    make(
        root, "train/good/000.png", "validation/good/000.png", "test/good/000.png",
        "test/logical_anomalies/000.png", "test/structural_anomalies/000.png",
    )  # fmt: skip
    for kind, count in (("logical_anomalies", 2), ("structural_anomalies", 1)):
        for i in range(count):
            mask = np.zeros(SHAPE, np.uint8)
            mask[2 * i : 2 * i + 3, 4:9] = 200 + i  # the two overlap
            save(root / f"ground_truth/{kind}/000/{i:03}.png", mask)
    return root


def ad2(root: Path) -> Path:
    return make(
        root, "train/good/000_regular.png", "validation/good/000_regular.png",
        "test_public/good/000_shift_1.png", "test_public/bad/000_regular.png",
        "test_public/ground_truth/bad/000_regular_mask.png", "test_private/000.png",
        "test_private_mixed/000.png",
    )  # fmt: skip


def visa(above: Path) -> Path:
    """Two categories; the folder of the first."""
    rows = []
    for category in ("candle", "pcb1"):
        for split, label, name in (
            ("train", "normal", "0001"), ("test", "normal", "0002"), ("train", "normal", "0000"),
            ("test", "anomaly", "001"), ("test", "anomaly", "000"),
        ):  # fmt: skip
            image = f"{category}/Data/Images/{label.capitalize()}/{name}.JPG"
            mask = f"{category}/Data/Masks/Anomaly/{name}.png" if label == "anomaly" else ""
            make(above, *filter(None, (image, mask)))
            rows.append(f"{category},{split},{label},{image},{mask}\n")
    table(above, HEAD + "".join(rows))
    return above / "candle"


def table(above: Path, text: str) -> None:
    (above / "split_csv").mkdir(exist_ok=True)
    (above / "split_csv" / "1cls.csv").write_text(text)


def found(root: Path, layout: str = "auto") -> list[tuple[str, str, str | None]]:
    """What is tested on, with paths below the root."""
    return [
        (os.path.relpath(path, root), kind, mask and os.path.relpath(mask, root))
        for path, kind, mask in labelled_images(root, layout)
    ]


def test_btad(tmp_path):
    root = btad(tmp_path)
    assert found(root) == found(root, "mvtec") == [
        ("test/ko/2.bmp", "ko", "ground_truth/ko/2.png"),
        ("test/ko/3.png", "ko", "ground_truth/ko/3.bmp"),
        ("test/ok/1.bmp", "good", None),
    ]  # fmt: skip
    assert training_images(root) == training_images(root, "mvtec") == str(root / "train/ok")


def test_mvtec_loco(tmp_path):
    root = loco(tmp_path)
    assert found(root) == found(root, "mvtec_loco") == [
        ("test/good/000.png", "good", None),
        ("test/logical_anomalies/000.png", "logical_anomalies",
         "ground_truth/logical_anomalies/000"),
        ("test/structural_anomalies/000.png", "structural_anomalies",
         "ground_truth/structural_anomalies/000"),
    ]  # fmt: skip
    assert training_images(root) == training_images(root, "mvtec_loco") == str(root / "train/good")
    assert training_images(root / "validation") == str(root / "validation")  # for recalibrate
    make(root, "ground_truth/logical_anomalies/000/aside/0.png")  # no mask of that image
    union = np.zeros(SHAPE, bool)
    union[0:5, 4:9] = True
    (_, logical, structural) = labelled_images(root)
    assert np.array_equal(read_mask(logical.mask_path, logical.path), union)
    assert read_mask(structural.mask_path, structural.path).sum() == 15


def test_mvtec_loco_in_deeper_folders(tmp_path):
    root = make(
        tmp_path / "loco", "train/good/0.png", "test/good/a/0.png", "test/logical/a/0.png",
        "test/logical/b/c/0.png", "ground_truth/logical/a/0/000.png",
        "ground_truth/logical/b/c/0/000.png",
    )  # fmt: skip
    assert found(root) == found(root, "mvtec_loco") == [
        ("test/good/a/0.png", "good", None),
        ("test/logical/a/0.png", "logical", "ground_truth/logical/a/0"),
        ("test/logical/b/c/0.png", "logical", "ground_truth/logical/b/c/0"),
    ]  # fmt: skip
    other = mvtec(tmp_path / "mvtec")
    make(other, "test/hole/0/1.png", "ground_truth/hole/0/1_mask.png")
    assert ("test/hole/0/1.png", "hole", "ground_truth/hole/0/1_mask.png") in found(other)


def test_a_folder_aside_makes_no_mvtec_loco(tmp_path):
    root = mvtec(tmp_path)
    make(root, "ground_truth/hole/drafts/0.png")
    assert [mask for _, _, mask in found(root)] == [
        None, "ground_truth/hole/0_mask.png", "ground_truth/hole/1.bmp"
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"0\.png has no mask: .*hole/0/000\.png is missing"):
        labelled_images(root, "mvtec_loco")


def test_the_union_of_masks_makes_the_pixel_figures(tmp_path):
    tests = labelled_images(loco(tmp_path))
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((3, *SHAPE)).astype(np.float32)
    truth = np.zeros((3, *SHAPE), bool)
    truth[1, 0:5, 4:9] = truth[2, 0:3, 4:9] = True
    maps += truth  # neither by chance nor without mistakes
    none = np.zeros(3)
    score = Score(np.arange(3.0), maps, none, None, [t.path for t in tests], none)
    figures = image_metrics(tests, score)
    for rows, part in (
        ([0, 1, 2], figures),
        ([0, 1], figures["per_defect"]["logical_anomalies"]),
        ([0, 2], figures["per_defect"]["structural_anomalies"]),
    ):
        flat = truth[rows].ravel(), maps[rows].ravel()
        precision, recall, _ = precision_recall_curve(*flat)
        f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-30)).max()
        assert part["pixel_auroc"] == pytest.approx(roc_auc_score(*flat), abs=1e-9)
        assert part["pixel_f1_max"] == pytest.approx(f1, abs=1e-9)
        assert part["aupro"] == pytest.approx(daf.metrics.aupro(truth[rows], maps[rows]), abs=1e-9)


def test_good_images_are_opened_once_for_all_figures(tmp_path, monkeypatch):
    """Defective ones twice for each set of figures that they are in; no sizes are read apart."""
    tests, opened = labelled_images(loco(tmp_path)), []
    monkeypatch.setattr(
        evaluation, "read_mask", lambda *paths: opened.append(paths[1]) or read_mask(*paths)
    )
    none = np.zeros(3)
    image_metrics(tests, Score(none, np.zeros((3, *SHAPE)), none, None, None, none))
    assert [opened.count(test.path) for test in tests] == [1, 4, 4]


def test_masks_of_one_image_are_checked_each(tmp_path):
    _, logical, _ = labelled_images(loco(tmp_path))
    save(Path(logical.mask_path) / "001.png", pixels(0, (20, 15)))
    with pytest.raises(InputError, match=r"001\.png is 15x20 pixels but its image .* is 16x20"):
        read_mask(logical.mask_path, logical.path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no masks: add them, or leave out their imag"):
        read_mask(str(tmp_path / "empty"), logical.path)


def test_mvtec_ad2(tmp_path):
    root = make(ad2(tmp_path), "test_public/ground_truth/overview.png")
    assert found(root) == found(root, "mvtec_ad2") == [
        ("test_public/bad/000_regular.png", "bad",
         "test_public/ground_truth/bad/000_regular_mask.png"),
        ("test_public/good/000_shift_1.png", "good", None),
    ]  # fmt: skip
    assert training_images(root) == training_images(root, "mvtec_ad2") == str(root / "train/good")
    assert training_images(root / "validation") == str(root / "validation")


def test_visa(tmp_path, monkeypatch):
    root = visa(tmp_path)
    expected = [
        ("Data/Images/Anomaly/000.JPG", "anomaly", "Data/Masks/Anomaly/000.png"),
        ("Data/Images/Anomaly/001.JPG", "anomaly", "Data/Masks/Anomaly/001.png"),
        ("Data/Images/Normal/0002.JPG", "good", None),
    ]
    assert found(root) == found(root, "visa") == expected
    training = [str(root / f"Data/Images/Normal/000{i}.JPG") for i in (0, 1)]
    assert training_images(root) == training_images(root, "visa") == training
    # A spreadsheet's mark in front of the table, and roots by other names.
    text = (tmp_path / "split_csv/1cls.csv").read_text()
    (tmp_path / "split_csv/1cls.csv").write_text(text, encoding="utf-8-sig")
    monkeypatch.chdir(root)
    for same in (".", f"{root}/", os.fsencode(root), "../candle"):
        assert training_images(same) == training
        assert [image.path for image in labelled_images(same)] == [
            str(root / path) for path, _, _ in expected
        ]


def test_visa_without_masks(tmp_path):
    root = visa(tmp_path)
    os.rename(root / "Data/Masks", root / "Data/elsewhere")
    assert [(kind, mask) for _, kind, mask in found(root)] == [
        ("anomaly", None), ("anomaly", None), ("good", None)
    ]  # fmt: skip


def test_anomalies_of_visa_are_not_trained_on(tmp_path):
    """Nor where a table for two classes stands in the place of that for one."""
    root = visa(tmp_path)
    path = tmp_path / "split_csv" / "1cls.csv"
    path.write_text(path.read_text().replace("test,anomaly", "train,anomaly"))
    assert len(training_images(root)) == 2
    for folder in (tmp_path, root / "Data", root / "Data/Images"):
        with pytest.raises(InputError, match="Anomaly lies in .*: give the folder of normal image"):
            daf.Detector().fit(folder)


@pytest.mark.parametrize("name", ["test_public", "test_private", "test_private_mixed", "Anomaly"])
def test_folders_of_tests_are_not_trained_on(tmp_path, name):
    make(tmp_path, "0.png", f"a/{name}/0.png")
    for check in (mvtec_train, training_images, lambda root: check_no_test(str(root), "images")):
        with pytest.raises(InputError, match=f"^{tmp_path}/a/{name} lies in {tmp_path}, and"):
            check(tmp_path)


def test_a_data_set_that_was_rearranged_in_its_place(tmp_path):
    """What had the MVTec AD layout before has it still."""
    root = visa(tmp_path)
    btad(root)
    assert training_images(root) == str(root / "train/ok")
    assert len(found(root)) == 3 and len(found(root, "visa")) == 3
    assert found(root) == found(root, "mvtec") != found(root, "visa")


def test_what_is_a_data_set(tmp_path):
    for layout in (mvtec, btad, loco, ad2, visa):
        assert is_data_set(layout(tmp_path / layout.__name__))
        assert is_data_set(tmp_path / layout.__name__) == (layout is not visa)
    assert not is_data_set(tmp_path / "visa" / "split_csv")


def test_files_and_plain_folders_are_trained_on_as_they_are(tmp_path):
    root = make(tmp_path, "a/0.png", "b/1.png")
    assert training_images(root) == str(root)
    assert training_images(root / "a/0.png") == str(root / "a/0.png")
    assert training_part("image", str(root)) == (str(root), None)


def unlink(*names):
    return lambda root: [(root / name).unlink() for name in names]


@pytest.mark.parametrize(
    "layout, change, message",
    [
        (btad, unlink("ground_truth/ko/2.png"),
         r"{root}/test/ko/2\.bmp has no mask: {root}/ground_truth/ko/2_mask\.png is missing; add "
         r"it, or remove the whole folder ground_truth\."),
        (loco, unlink("ground_truth/structural_anomalies/000/000.png"),
         r"{root}/test/structural_anomalies/000\.png has no mask: "
         r"{root}/ground_truth/structural_anomalies/000/000\.png is missing; add it, or remove the "
         r"whole folder ground_truth\."),
        (ad2, unlink("test_public/ground_truth/bad/000_regular_mask.png"),
         r"{root}/test_public/bad/000_regular\.png has no mask: {root}/test_public/ground_truth/bad"
         r"/000_regular_mask\.png is missing; add it, or remove the whole folder ground_truth\."),
        (ad2, unlink("test_public/bad/000_regular.png", "test_public/good/000_shift_1.png"),
         r"{root}/test_public holds no images: it needs folders of images, such as "
         r"test_public/good\."),
        (visa, unlink("Data/Masks/Anomaly/001.png"),
         r"{root}/Data/Images/Anomaly/001\.JPG has no mask: {table} names "
         r"'candle/Data/Masks/Anomaly/001\.png', which is missing; add it, or remove the whole "
         r"folder {root}/Data/Masks\."),
        (visa, unlink("../split_csv/1cls.csv"),
         r"{table} is missing: it tells which of VisA's images are for training; put the file "
         r"split_csv/1cls\.csv of the VisA download there\."),
    ],
)  # fmt: skip
def test_what_is_missing(tmp_path, layout, change, message):
    root = layout(tmp_path / "set")
    change(root)
    message = message.format(root=root, table=root.parent / "split_csv" / "1cls.csv")
    with pytest.raises(InputError, match=f"^{message}$"):
        labelled_images(root)
    if "split_csv" in message and "mask" not in message:
        with pytest.raises(InputError, match=f"^{message}$"):
            training_images(root)


@pytest.mark.parametrize(
    "text, message",
    [
        (HEAD + "pcb1,train,normal,a.JPG,\n",
         r"{table} has no category 'candle': give the folder of one that it has, pcb1\."),
        (HEAD + "candle,test,normal,a.JPG,\ncandle,test,bad,b.JPG,\n",
         r"row 2 of {table} has the label 'bad': it is to be normal or anomaly\."),
        (HEAD + "candle,train,normal,a.JPG,\n",
         r"{table} has no images of candle in the split test: replace it\."),
        (HEAD + "candle,test,anomaly,a.JPG,\n",
         r".*/a\.JPG has no mask: {table} names '', which is missing; add it, or remove .*"),
        (HEAD + "candle,test,normal\n", r"row 1 of {table} is too short: complete or remove it\."),
        ("object,split,label,image\ncandle,test,normal,a.JPG\n",
         r"{table} lacks one of the columns image, label, mask, object, split\."),
        (HEAD, r"{table} lacks one of the columns image, label, mask, object, split\."),
    ],
)  # fmt: skip
def test_tables_of_visa_that_are_not_right(tmp_path, text, message):
    root = visa(tmp_path)
    table(tmp_path, text)
    message = message.format(table=tmp_path / "split_csv" / "1cls.csv")
    with pytest.raises(InputError, match=f"^{message}$"):
        labelled_images(root)


def test_layouts_that_are_not_there(tmp_path):
    root = make(tmp_path, "0.png", "file.png")
    for take in (labelled_images, training_images):
        with pytest.raises(
            InputError,
            match=r"^unknown layout 'folder': choose auto, mvtec, mvtec_loco, mvtec_ad2, visa$",
        ):
            take(root, "folder")
        for wrong in (root / "absent", root / "file.png"):
            with pytest.raises(InputError, match=f"^{wrong} is not a folder: give the root of a"):
                take(wrong, "visa")
        with pytest.raises(InputError, match="1cls.csv is missing"):
            take(root, "visa")
    for layout, name in (
        ("auto", "test"), ("mvtec", "test"), ("mvtec_loco", "test"), ("mvtec_ad2", "test_public")
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^{root} has no folder {name}: evaluation needs t"):
            labelled_images(root, layout)
    for layout in ("mvtec", "mvtec_loco", "mvtec_ad2"):
        with pytest.raises(
            InputError,
            match=f"^{root} has no folder train/good: it is not in the layout {layout}; choose ano",
        ):
            training_images(root, layout)


def test_options_of_another_kind_are_refused():
    for options, message in (
        (("image", "auto", "siren", None), "^normal and folds are for audio: .* for images$"),
        (("image", "visa", None, [1]), "^normal and folds are for audio: .* for images$"),
        (("vector", "visa", None, None), "^layout is for images and audio: .* for vectors$"),
        (("vector", "auto", "siren", None), "^normal and folds are for audio: .* for vectors$"),
    ):
        kind, *rest = options
        with pytest.raises(InputError, match=message):
            training_part(kind, "here", *rest)
    with pytest.raises(InputError, match="unknown layout 'dcase'"):
        training_part("image", "here", "dcase")


def test_evaluate_asks_for_a_layout(tmp_path, monkeypatch):
    asked = []

    def evaluate(detector, tests, strict):
        asked.append(tests)
        return SimpleNamespace(metrics={})

    monkeypatch.setattr("diffad_fast.detector.evaluate", evaluate)
    detector = daf.Detector()
    root = visa(tmp_path)
    btad(root)
    for layout in ("auto", "visa"):
        assert detector.evaluate(root, layout=layout) == {}
    assert asked == [labelled_images(root, "mvtec"), labelled_images(root, "visa")]
    assert all(isinstance(image, TestImage) for images in asked for image in images)


def test_ok_is_normal_for_recordings_too(tmp_path):
    for name in ("train/ok/0.wav", "train/ko/1.wav", "test/ok/2.wav", "test/ko/3.wav"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    assert [clip.path for clip in training_clips(tmp_path)] == [str(tmp_path / "train/ok/0.wav")]
    assert [(clip.kind, clip.anomaly) for clip in labelled_clips(tmp_path)] == [
        ("ko", True), ("ok", False)
    ]  # fmt: skip


@pytest.mark.parametrize("kind, option", [("image", {"layout": "visa"}), ("audio", {"folds": [1]})])
def test_options_of_folders_beside_a_list(kind, option):
    with pytest.raises(InputError, match="tell how a folder is read, and the data is a list"):
        daf.Detector(kind=kind).evaluate([TestImage("a.png", "good", None)], **option)


def test_a_folder_train_is_no_visa(tmp_path):
    """Though it holds VisA's folders too."""
    for folder in ("Data/Images/Normal", "train/good"):
        (tmp_path / folder).mkdir(parents=True)
    assert training_images(tmp_path) == str(tmp_path / "train" / "good")
