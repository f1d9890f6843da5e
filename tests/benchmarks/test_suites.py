"""Whole runs of a suite."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, results
from benchmarks.__main__ import main
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


def test_a_filtered_run_keeps_apart_from_the_whole_one(suite, tmp_path):
    _, result, text = suite(tmp_path, "cpu", "--filter", "^q_sample")
    (path,) = tmp_path.glob("*.json")
    assert path.name.endswith("-cpu-quick-filtered.json")
    assert "suite `cpu`, only what matches `^q_sample`, quick" in text
    assert results.newest(tmp_path)["cpu"][0][0] == path  # until there is another
    whole = results.write({**result, "filtered": "", "quick": False}, tmp_path)
    assert whole != path and results.newest(tmp_path)["cpu"][0][0] == whole


NO_RESULT = Path(__file__)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("compare missing.json other.json", "missing.json cannot be read: "),
        (f"compare {NO_RESULT} {NO_RESULT}", f"{NO_RESULT} cannot be read: "),
        (f"compare {results.RESULTS / 'audio.json'} other.json", "is no result of a suite"),
        ("cpu --quick --baseline missing.json", "missing.json cannot be read: "),
        ("cpu --quick --filter (", "'(' is no regular expression: "),
        ("metrics --quick --filter haar", "no case of the suite metrics matches --filter 'haar'"),
        ("end-to-end --quick --filter haar", "end-to-end has no cases to choose from"),
        ("all --quick --filter haar", "run that suite alone"),
        ("metrics --device cuda", "suite metrics runs on cpu, not on cuda"),
        ("end-to-end --data /nonexistent", "/nonexistent is not a folder"),
        ("end-to-end --data {folder}", "has no folder test"),
        ("quality --data /nonexistent", "/nonexistent is not a folder"),
        ("quality --data {folder}", "holds neither images in a known layout nor .npz tables"),
        ("quality --data {folder} --group-number (", "'(' is no regular expression: "),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence_at_once(
    tmp_path, monkeypatch, capsys, arguments, sentence
):
    """With a status that never means "slower" or "wrong"."""
    monkeypatch.setattr(harness.Run, "measure", lambda *given: pytest.fail("measured"))
    argv = arguments.format(folder=tmp_path).split()
    monkeypatch.setattr(sys, "argv", ["benchmarks", *argv])
    try:
        status = main()
    except SystemExit as stopped:  # argparse's
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2 and sentence in error.splitlines()[-1]


def test_the_gpu_suite_fails_loudly_without_a_gpu(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    assert main() == 2
    assert "suite gpu needs a CUDA device" in capsys.readouterr().err
