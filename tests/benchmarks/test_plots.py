"""Plots from results."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import plots
from benchmarks.case import OURS, REFERENCE


def test_plots_are_drawn_from_the_json_alone(fake, tmp_path):
    pytest.importorskip("matplotlib")
    result = fake({OURS: 2.0, REFERENCE: 4.0})
    for i, (axis, value) in enumerate([("batch", 1), ("batch", 8), ("steps", 1), ("steps", 4)]):
        row = copy.deepcopy(fake({OURS: 2.0 + i, REFERENCE: 4.0})["rows"][0])
        result["rows"].append({**row, "case": f"{axis} {value}", "sweep": {axis: value}})
    result = json.loads(json.dumps(result))
    drawn = plots.draw(result, tmp_path / "stem")
    assert [path.name for path in drawn] == [
        "stem-bars.png",
        "stem-roofline.png",
        "stem-growth.png",
    ]
    for path in drawn:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 150_000
