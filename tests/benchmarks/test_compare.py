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
    text, slower = compare.report(before, fake({OURS: 1.3, "peer": 3.9}))
    assert not slower and ", 0 changed by more than 5% beside the baselines, " in text
    assert "which drifted by 0.77×" in text
    # It is faster by an eighth, and ours by less: that is slower, whatever the clock says.
    text, slower = compare.report(before, fake({OURS: 1.15 / 1.12, "peer": 3 / 1.12}))
    assert slower == ["op case"] and "0.87×" in text
    # One baseline that is another now does not move the others' median.
    before = fake({OURS: 1.0, REFERENCE: 2.0, "peer": 3.0, "other": 4.0})
    after = fake({OURS: 1.0, REFERENCE: 2.0, "peer": 3.0, "other": 40.0})
    assert compare.report(before, after)[1] == []


def test_what_has_no_time_any_more_is_slower(fake):
    dtype = f"{OURS}, bfloat16"
    before, after = (fake({OURS: 1.0, dtype: 0.5, "peer": 3.0}) for _ in range(2))
    found = after["rows"][0]["contenders"]
    del found[dtype], found["peer"]["ms"], found[OURS]["ms"]
    found[OURS]["wrong"] = "off by 1"
    text, slower = compare.report(before, after)
    assert slower == ["op case"]
    assert f"NO TIME any more: op case, {OURS}: WRONG: off by 1." in text
    assert f"NO TIME any more: op case, {dtype}: gone." in text and "peer" not in text
    # A case that was not run says nothing, nor does what had no time before.
    assert compare.report(before, {**after, "rows": []})[1] == []
    assert compare.report(after, after)[1] == []


def test_other_vectors_and_another_torch_are_told(fake):
    before, after = fake({OURS: 1.0}), fake({OURS: 1.0})
    assert "WARNING" not in compare.report(before, after)[0]
    before["machine"]["cpu_features"] = "AVX9"
    before["machine"]["versions"] = {**before["machine"]["versions"], "torch": "1.0"}
    text, _ = compare.report(before, after)
    assert "WARNING: cpu_features differs (AVX9, " in text
    assert "WARNING: torch differs (1.0, " in text and text.count("WARNING") == 2


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
