"""Reports in Markdown."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine
from benchmarks import tables as report
from benchmarks.case import OURS, REFERENCE

CPU = torch.device("cpu")


def test_losses_stand_in_the_table(fake):
    result = fake({OURS: 2.0, REFERENCE: 4.0, "better peer": 1.0, "equal peer": 2.0})
    (line,) = report.summary(result["rows"])[2:]
    assert "2× (2–2)" in line and "better peer **0.5×**" in line and "equal peer *1× even*" in line
    assert "50% of memory" in line
    assert report.losses(result["rows"]) == result["rows"]
    own = fake({OURS: 2.0, REFERENCE: 4.0, f"{OURS}, bfloat16": 1.0})["rows"]
    assert report.losses(own) == [] and list(report.faster(own[0], own=True)) == [
        f"{OURS}, bfloat16"
    ]


def test_a_whole_network_has_no_share(fake):
    """Nor has one in a recorded result, whose FLOPs stand without bytes."""
    (row,) = fake({OURS: 2.0})["rows"]
    assert report.share_cell(row) == "50% of memory"
    assert report.share_cell({**row, "bytes": 0, "bound": "matrix"}) == ""


def test_training_goals_stand_in_the_report(fake):
    result = fake({OURS: 2.0, REFERENCE: 4.0, f"{REFERENCE}, channels_last": 3.0})
    result["suite"] = "train"
    assert report.training_goals(result) == []  # a case without goals
    row = result["rows"][0]
    row["name"] = "unet-small, batch 16, 256×256"
    row["parameters"] = 4
    for name, peak in ((OURS, 60), (REFERENCE, 100), (f"{REFERENCE}, channels_last", 101)):
        row["contenders"][name]["counts"]["peak_bytes"] = peak
    text = report.markdown(result)
    head = "| unet-small, batch 16, 256×256 | reference"
    # With 5 vectors of ours and 4 of theirs: (60 + 80) / (100 + 64).
    first = f"{head} | 500 samples/s | 2× (2–2) | 2.5×: missed |"
    assert f"{first} 85% | 60%: missed |" in text
    other = f"{head}, channels_last | 500 samples/s | 1.5× (1.5–1.5) | 1.3×: reached |"
    assert f"{other} 85% | 60%: missed |" in text
    row["contenders"][REFERENCE]["counts"]["peak_bytes"] = 170
    assert f"{first} 60% | 60%: reached |" in report.markdown(result)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("convolutions", [False, True])
def test_tf32_is_off_where_products_and_convolutions_have_it_off(
    monkeypatch, fake, products, convolutions
):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=products))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
    text = report.markdown(fake({OURS: 2.0}))
    assert ("Settings: tf32 off, cudnn_tf32 off" in text) == (not products and not convolutions)
    assert ("cudnn_tf32 on" in text) == convolutions


def test_settings_and_machine_stand_in_the_report(fake):
    text = report.markdown(fake({OURS: 2.0, REFERENCE: 4.0}, note="another function"))
    m = machine.describe(CPU)
    for part in (m["cpu"], m["versions"]["torch"], str(m["commit"]), "10 GB/s",
                 "another function", "float32 | contiguous | no | off"):  # fmt: skip
        assert part in text
    for name, why in m["absent_peers"].items():
        assert f"{name} ({why}" in text
