"""Rounds: who runs when, and how often."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from benchmarks import harness, timing
from benchmarks.timing import rounds


def test_rounds_interleave_in_changing_order():
    order = []

    class Clock:
        def start(self, run):
            order.append(run)
            return lambda: 1.0

    times = rounds({"a": "a", "b": "b", "c": "c"}, Clock(), 9.0, 300, 300)
    played = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert played[0] == "abc"  # only warms up
    assert all(sorted(one) == ["a", "b", "c"] for one in played)
    # Of six orders and six pairs of neighbours within a round, each about as often as the others.
    counts = [played[1:].count("".join(p)) for p in itertools.permutations("abc")]
    assert min(counts) > 30 and sum(counts) == 300
    assert times == {name: [1.0] * 300 for name in "abc"}


def test_a_slow_contender_runs_in_every_third_round():
    order = []

    class Clock:
        def start(self, run):
            order.append(run)
            return lambda: {"a": 1.0, "b": 3.9, "c": 4.1}[run]

    runs = {"a": "a", "b": "b", "c": "c"}
    times = rounds(runs, Clock(), 0.0, 99, 99, leader="a", each=3)
    assert [sorted(order[3:][i:j]) for i, j in ((0, 3), (3, 5), (5, 7), (7, 10))] == [
        ["a", "b", "c"], ["a", "b"], ["a", "b"], ["a", "b", "c"]
    ]  # fmt: skip
    assert {name: len(found) for name, found in times.items()} == {"a": 7, "b": 7, "c": 3}


@pytest.mark.parametrize("leader, fast, slow", [("a", 19, 7), (None, 7, 7)])
def test_everybody_runs_in_seven_rounds_however_long_they_take(monkeypatch, leader, fast, slow):
    class Clock:
        def start(self, run):
            return lambda: {"a": 1.0, "b": 9.0}[run]

    times = rounds({"a": "a", "b": "b"}, Clock(), 0.0, 1, 99, leader)
    assert {name: len(found) for name, found in times.items()} == {"a": fast, "b": slow}
    # Nor are there fewer where the time is over, but not ten times.
    clock = itertools.chain([0.0], itertools.repeat(2.0))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    times = rounds({"a": "a", "b": "b"}, Clock(), 1.0, 5, 99, leader)
    assert {name: len(found) for name, found in times.items()} == {"a": fast, "b": slow}
    assert harness.FULL.each == 7
