"""Whole runs of a suite."""

from __future__ import annotations

import pytest
import torch

from benchmarks.case import OURS
from diffad_fast.ops import dispatch


def test_a_wrong_operator_gets_no_time_and_fails_the_run(suite, tmp_path, monkeypatch):
    operator = dispatch.OPERATORS["haar_pack"]
    name = operator.backend("cpu")
    right = operator.implementations[name]

    def spoiled(x, level):
        y = right(x, level).clone()
        y[0, 0, 0, 0] += 1e-3
        return y

    monkeypatch.setitem(operator.implementations, name, spoiled)
    status, result, text = suite(tmp_path, "cpu", "--filter", "haar_pack level 3")
    (row,) = result["rows"]
    assert status == 1
    assert "ms" not in row["contenders"][OURS] and "error" in row["contenders"][OURS]["wrong"]
    assert "ms" in row["contenders"]["conv2d with fixed filters"]
    assert all("ratio" not in entry for entry in row["contenders"].values())
    assert "Wrong, and not timed" in text and "WRONG: error" in text


def test_the_gpu_suite_fails_loudly_without_a_gpu(suite, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        suite(tmp_path, "gpu")
