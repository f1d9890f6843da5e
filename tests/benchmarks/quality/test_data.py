"""Which samples are for choices, and which show one object."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.data import find, objects, part_of
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
