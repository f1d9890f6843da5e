"""Which samples are for choices, and which show one object."""

from __future__ import annotations

from benchmarks.quality.data import objects, part_of


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
