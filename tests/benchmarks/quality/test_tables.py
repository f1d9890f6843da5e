"""What stands in the README, and the table of robustness."""

from __future__ import annotations

import json

import numpy as np

from benchmarks import results
from benchmarks.case import OURS
from benchmarks.quality import controls, dte
from benchmarks.quality import tables as quality_tables


def test_the_best_of_the_others_stands_in_the_readme():
    result = json.loads((results.RESULTS / "quality-tables.json").read_text(encoding="utf-8"))
    best = max(controls.CONTROLS, key=lambda name: np.mean(
        [[run["auroc"] for run in one["runs"][name]] for one in result["sets"]]
    ))  # fmt: skip
    for one in result["sets"]:
        for name in (controls.NEAREST, *dte.DETECTORS):
            one["runs"].pop(name, None)
    ((_, _, cell),) = quality_tables.headlines(result)
    assert cell.startswith(f"{best}: AUROC ")
    for one in result["sets"]:
        one["runs"][controls.NEAREST] = [{"auroc": 0.99, "f1_max": 0.5}] * len(result["seeds"])
    assert quality_tables.headlines(result)[0][2] == "nearest, all normals: AUROC 99.0 ± 0.0"
    # A detector that was made smaller is not what its authors compare.
    result["anoddpm"] = dict(quality_tables.PUBLISHED)
    assert len(quality_tables.headlines(result)) == 1
    result["anoddpm"]["steps"] = 6000
    assert quality_tables.headlines(result) == []
    del result["anoddpm"]
    # Nothing of what a result of robustness says is about detection.
    result["sets"][0]["robustness"] = {OURS: [{"noise": -0.1}]}
    assert quality_tables.headlines(result) == []


def test_means_leave_out_what_stands_in_a_dev_table():
    result = json.loads((results.RESULTS / "quality-tables.json").read_text(encoding="utf-8"))
    whole, rest = result["sets"], [one for one in result["sets"] if not one.get("stands_in")]
    assert (len(whole), len(rest)) == (6, 4)
    mean = np.mean([[run["auroc"] for run in one["runs"][OURS]] for one in rest], axis=0)
    expected = f"{100 * mean.mean():.1f} ± {100 * mean.std(ddof=1):.1f}"
    ((_, cell, _),) = quality_tables.headlines(result)
    assert cell == f"AUROC {expected}"
    text = quality_tables.summary(result)
    assert f"| mean of 4 | **{OURS}** | {expected} |" in text
    assert "All rows of WBC stand in breastw, on which choices were made" in text
    assert f"| WBC, in breastw (107 + 10) | {OURS} |" in text
    assert f"| satellite (2200 + 2036) | {OURS} |" in text
    result["sets"] = [one for one in whole if one.get("stands_in")]
    assert quality_tables.headlines(result) == []


def test_robustness_has_a_column_for_each_method():
    one = {"name": "tiles", "robustness": {
        "ours": [{"2% hidden anomalies": -0.01, "noise": -0.3}, {"noise": -0.2}],
        "other": [{"noise": 0.015}],
    }}  # fmt: skip
    assert quality_tables._robustness(one)[3:] == [
        "| what | ours | other |",
        "| --- | --- | --- |",
        "| 2% hidden anomalies | -1.0 |  |",
        "| noise | -25.0 ± 7.1 | +1.5 |",
    ]
