"""What got slower between two results."""

from __future__ import annotations

import numpy as np

from benchmarks import compare
from benchmarks.case import OURS, REFERENCE
from benchmarks.cases.integrations import DIRECT, INNERMOST
from benchmarks.timing import HostClock
from diffad_fast.ops import dispatch


def test_compare_tells_what_got_slower_beyond_noise(fake):
    before = fake({OURS: 1.0, "peer": 3.0})
    text, slower = compare.report(before, fake({OURS: 1.3, "peer": 3.0}))
    assert slower == ["op case"]
    assert "| op case | diffad_fast | 1" in text and "slower" in text
    text, slower = compare.report(before, fake({OURS: 0.7, "peer": 3.0}))
    assert not slower and "faster" in text
    assert compare.report(before, fake({OURS: 1.02, "peer": 3.0}))[1] == []
    # The whole machine is slower: what did not change shows it.
    assert compare.report(before, fake({OURS: 1.3, "peer": 3.9}))[1] == []


def test_whatever_is_ours_may_get_slower_and_shows_no_drift(fake):
    """Other modes and dtypes, and in the suite `plugins` all contenders."""
    ours = [f"{OURS}, bfloat16", f"{OURS} unet-small, one_step", DIRECT, INNERMOST]
    for name in ours:
        before = fake({OURS: 1.0, REFERENCE: 3.0, name: 1.0})
        text, slower = compare.report(before, fake({OURS: 1.0, REFERENCE: 3.0, name: 1.3}))
        assert slower == ["op case"] and f"| op case | {name} | 1" in text
        assert "drifted by 1.00×" in text
    before = fake(dict.fromkeys([OURS, *ours], 1.0))
    text, slower = compare.report(before, fake(dict.fromkeys([OURS, *ours], 1.3)))
    assert slower == ["op case"] and "No baseline shows a drift." in text


def test_a_slow_operator_shows_in_compare(suite, tmp_path, monkeypatch):
    """By a clock that tells what the operator says it has done, within a hundredth."""
    noise, work = np.random.default_rng(0), [1.0]

    def start(clock, run):
        work[0] = 1.0
        run()
        elapsed = work[0] * noise.uniform(1.0, 1.01)
        return lambda: elapsed

    monkeypatch.setattr(HostClock, "start", start)
    arguments = ("cpu", "--filter", "^q_sample")
    _, before, _ = suite(tmp_path / "before", *arguments)
    operator = dispatch.OPERATORS["q_sample"]
    right = operator.implementations["reference"]

    def slow(*given):
        work[0] = 5.0
        return right(*given)

    monkeypatch.setitem(operator.implementations, operator.backend("cpu"), slow)
    path = next((tmp_path / "before").glob("*.json"))
    status, after, _ = suite(tmp_path / "after", *arguments, "--baseline", str(path))
    assert not after["wrong"] and status == 1
    assert compare.report(before, after)[1] == [before["rows"][0]["case"]]
    # Baselines that are as slow as before show that the machine has not changed.
    assert before["rows"][0]["contenders"][REFERENCE]["p50"] < 1.1
