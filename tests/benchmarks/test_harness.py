"""What is measured of a case, and what of a failing one."""

from __future__ import annotations

import torch

from benchmarks import cases, harness
from benchmarks.case import OURS, Case, Contender

CPU = torch.device("cpu")


def small(operator: str) -> Case:
    """The quick case of an operator."""
    families = (*cases.OPERATORS, "metrics")
    return next(c for c in cases.load(families, "cpu", quick=True) if c.operator == operator)


def measured(case: Case) -> harness.Run:
    run = harness.Run(CPU, harness.QUICK, quick=True)
    run.measure([case])
    return run


def test_a_failing_operator_fails_the_run_and_a_failing_peer_is_named(monkeypatch):
    case = small("q_sample")

    def refuse(*inputs):
        raise RuntimeError("no such thing")

    contenders = dict(case.contenders) | {"peer": Contender(refuse)}
    run = measured(Case(**{**vars(case), "contenders": contenders}))
    assert not run.wrong
    assert run.rows[0]["contenders"]["peer"]["failed"] == "RuntimeError: no such thing"
    contenders = {OURS: Contender(refuse)}
    run = measured(Case(**{**vars(case), "contenders": contenders}))
    assert len(run.wrong) == 1 and "no such thing" in run.wrong[0]


def test_a_part_of_the_work_is_scaled_and_compared_in_its_own_rounds(monkeypatch):
    sampled = {OURS: [1.0, 9.0, 9.0, 2.0], "peer": [10.0, 20.0]}
    monkeypatch.setattr(harness, "rounds", lambda *arguments: sampled)
    ones = Contender(lambda: torch.ones(3))
    case = Case("op", "name", lambda device: (), lambda inputs: torch.ones(3),
                {OURS: ones, "peer": Contender(ones.run, part=0.1)})  # fmt: skip
    entry = measured(case).rows[0]["contenders"]["peer"]
    assert entry["ms"] == [100.0, 200.0] and entry["p50"] == 150.0
    assert entry["ratio"]["value"] == entry["ratio"]["low"] == entry["ratio"]["high"] == 100.0


def test_inputs_are_made_as_a_program_makes_them(monkeypatch):
    """Not in inference mode, in which they are measured."""
    monkeypatch.setattr(harness.Run, "_cache", lambda self: 1 << 10)  # several copies
    seen = set()

    def run(x):
        seen.add(x.data_ptr())
        assert torch.is_inference_mode_enabled() and not x.is_inference()
        return x + 1

    case = Case("op", "name", lambda device: (torch.ones(8),), lambda x: x[0] + 1,
                {OURS: Contender(run)})  # fmt: skip
    assert not measured(case).wrong
    assert len(seen) > 2


def test_an_interrupted_suite_keeps_what_it_measured():
    def interrupt(x):
        raise KeyboardInterrupt

    def case(name, run):
        inputs = lambda device: (torch.ones(2),)  # noqa: E731
        return Case("op", name, inputs, lambda x: x[0], {OURS: Contender(run)})

    runner = harness.Run(CPU, harness.QUICK, quick=True)
    runner.measure([case("first", torch.clone), case("second", interrupt)])
    assert [row["name"] for row in runner.rows] == ["first"]
    assert runner.wrong == ["interrupted: only the first 1 cases are measured"]
