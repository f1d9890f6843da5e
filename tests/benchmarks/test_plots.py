"""Plots from results."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from benchmarks import plots
from benchmarks.case import OURS, REFERENCE


def test_spreads_over_seeds_are_those_of_the_tables():
    pytest.importorskip("matplotlib")
    runs = {OURS: [0.8, 0.9, 0.94], "alone": [0.85]}
    one = {
        "name": "tiles", "kind": "image",
        "runs": {name: [{"image_auroc": v} for v in values] for name, values in runs.items()},
        "costs": {name: [{"latency_ms": 5.0}] for name in runs},
    }  # fmt: skip
    (axes,) = plots.quality({"sets": [one]}).axes
    for container, values in zip(axes.containers, runs.values(), strict=True):
        ((low, high),) = container.lines[2][0].get_segments()
        spread = np.std(values, ddof=1) if len(values) > 1 else 0
        assert high[1] - low[1] == pytest.approx(200 * spread)


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
