"""Which images whole detectors are tested on, and the check of the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(
    "maps, scores, reason",
    [
        (np.ones((1, 4, 4)), np.ones(1), None),
        (np.ones((1, 4, 4)), np.full(1, np.nan), "not finite"),
        (np.full((1, 4, 4), np.inf), np.ones(1), "not finite"),
        (np.ones((1, 4, 4)), np.ones(2), "2 scores instead of 1"),
    ],
)
def test_published_detectors_are_checked(maps, scores, reason):
    class Model:
        compiled, note, parameters = False, "", 0

        def __call__(self, images, steps):
            return maps, scores

    runner = SimpleNamespace(device=torch.device("cpu"))
    entry = end_to_end._one_by_one(runner, Model(), 50, torch.ones(3, 1, 4, 4))
    if reason is None:
        assert len(entry["ms"]) == 3 and "wrong" not in entry
    else:
        assert "ms" not in entry and "p50" not in entry and reason in entry["wrong"]
