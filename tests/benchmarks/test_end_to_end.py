"""Which images whole detectors are tested on."""

from __future__ import annotations

from pathlib import Path

from benchmarks import end_to_end


def test_whole_detectors_are_tested_on_the_report_part(tmp_path):
    from PIL import Image

    names = ["000", "001", "002", "003", "004"]
    for kind in ("good", "scratch"):
        (tmp_path / "test" / kind).mkdir(parents=True)
        for name in names:
            Image.new("L", (8, 8)).save(tmp_path / "test" / kind / f"{name}.png")
            if kind != "good":
                masks = tmp_path / "ground_truth" / kind
                masks.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 255).save(masks / f"{name}_mask.png")

    def found(made_up):
        return sorted(Path(test.path).stem for test in end_to_end._tests(tmp_path, made_up))

    assert found(made_up=False) == sorted(2 * ["000", "001", "004"])
    assert found(made_up=True) == sorted(2 * names)
