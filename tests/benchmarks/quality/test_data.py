"""Which samples are for choices, and which show one object."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.data import STANDS_IN, find, objects, part_of
from diffad_fast.errors import InputError


def test_parts_stay_what_choices_were_made_on():
    # By the name alone: another rule would report on images that options were chosen by.
    report = ["000.png", "001.png", "x/004.bmp", "a.jpg", "f.png", "g.tif"]
    dev = ["002.png", "y/003.png", "exp1_num_100.png", "exp1_num_101.png", "c.png", "e.png"]
    assert [part_of(name) for name in report + dev] == ["report"] * 6 + ["dev"] * 6


def test_a_step_larger_than_the_gap_begins_an_object():
    names = [f"photo{i}_num_{n}.png" for i, n in enumerate((500, 100, 300, 301, 100, 702))]
    assert objects(names, r"num_(\d+)", 202) == [0, 0, 0, 0, 0, 0]
    assert objects(names, r"num_(\d+)", 200) == [0, 0, 0, 0, 0, 1]
    assert objects(names, r"num_(\d+)", 199) == [1, 0, 1, 1, 0, 2]
    for pattern in (r"nom_(\d+)", r"num_\d+", r"(num)_\d+"):
        with pytest.raises(InputError, match=f"--group-number .* is no number in {names[0]}"):
            objects(names, pattern, 200)


def test_categories_of_visa_and_their_folder(tmp_path):
    table = ["object,split,label,image,mask"]
    for i, category in enumerate(("candle", "pcb1")):
        for split, label, name in (
            ("train", "normal", "0"), ("test", "normal", "1"), ("test", "anomaly", "2")
        ):  # fmt: skip
            image = f"{category}/Data/Images/{label.capitalize()}/{name}.JPG"
            (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / image)
            table.append(f"{category},{split},{label},{image},")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text("\n".join(table) + "\n")
    for path, names in ((tmp_path, ["candle", "pcb1"]), (tmp_path / "pcb1", ["pcb1"])):
        sets = find(path, 32, 1, None, 0)
        assert [one.name for one in sets] == names
        for one in sets:
            normal = tmp_path / one.name / "Data" / "Images" / "Normal"
            assert one.train.paths == [str(normal / "0.JPG")]
            assert one.test.paths[1] == str(normal / "1.JPG")
            assert one.label.tolist() == [1, 0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither images in a known layout nor .npz tables"):
        find(tmp_path / "empty", 32, 1, None, 0)


def test_tables_that_stand_in_dev_tables_are_no_report(tmp_path):
    parts = {"2_annthyroid": "dev", "38_thyroid": "dev", "42_WBC": "dev", "43_WDBC": "report"}
    for name in parts:
        np.savez(tmp_path / name, X=np.zeros((4, 2)), y=np.array([0, 0, 0, 1]))
    sets = find(tmp_path, 32, 1, None, 0)
    assert {one.name: one.part[0] for one in sets} == {
        name.split("_")[1]: part for name, part in parts.items()
    }
    assert {one.name: one.stands_in for one in sets if one.stands_in} == STANDS_IN


@pytest.mark.parametrize("name", STANDS_IN)
def test_every_row_of_such_a_table_is_in_the_dev_table(data_dir, name):
    """Where each column was scaled to 0 to 1, by the two of its values in the dev table that give
    most others back."""

    def rows(name):
        (path,) = (data_dir / "adbench" / "Classical").glob(f"*_{name}.npz")
        return np.load(path)["X"].astype(np.float64)

    inner, outer = rows(name), rows(STANDS_IN[name])
    if inner.max() == 1:
        for column, values in zip(inner.T, map(np.unique, outer.T), strict=True):
            pairs = [(low, high) for low in values[:3] for high in values[-12:] if low < high]
            scaled = [column * (high - low) + low for low, high in pairs]
            known = [np.isin(found.round(5), values.round(5)).mean() for found in scaled]
            column[:] = scaled[np.argmax(known)]
    known = set(map(bytes, outer.round(5)))
    assert all(bytes(row) in known for row in inner.round(5) + 0.0)
