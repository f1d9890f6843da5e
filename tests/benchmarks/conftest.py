"""What tests of suites share: measurements that take no time, a suite's run, a result made up."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import harness, machine, results, stats
from benchmarks.__main__ import main
from benchmarks.case import OURS, Contender

CPU = torch.device("cpu")
TINY = harness.Effort(seconds=0.0, at_least=3, each=3, compile_seconds=0.0)
CEILINGS = {
    "copy_gb_per_s": 10.0, "clone_gb_per_s": 5.0, "copy_megabytes": 1,
    "matrix_gflop_per_s": {"float32": 100.0},
    "matrix_side": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_long_measurements(monkeypatch):
    monkeypatch.setattr(harness.ceilings, "measure", lambda device, quick: CEILINGS)
    monkeypatch.setattr(harness, "QUICK", TINY)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the suites refuse it


@pytest.fixture
def suite(monkeypatch):
    """Exit status, JSON and Markdown of `python -m benchmarks ... --quick`."""

    def run(out: Path, *arguments: str) -> tuple[int, dict, str]:
        argv = ["benchmarks", *arguments, "--quick", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", argv)
        status = main()
        path = next(out.glob("*.json"))
        return status, results.read(path), path.with_suffix(".md").read_text()

    return run


@pytest.fixture
def fake():
    """A result with samples around the given milliseconds."""
    return _result


def _result(times: dict[str, float], note: str = "") -> dict:
    noise = 1 + 0.02 * np.random.default_rng(0).permutation(np.linspace(-1, 1, 41))
    entries = {}
    for name, ms in times.items():
        samples = (ms * noise).tolist()
        settings = Contender(lambda: None, note=note).settings(CPU)
        entries[name] = {"settings": settings, "ms": samples, **stats.quantiles(samples),
                         "per_second": 1e3 / ms, "first_call_ms": ms,
                         "counts": {"operators": 2, "peak_bytes": 0}}  # fmt: skip
        if name != OURS:
            ratio = stats.ratio(samples, entries[OURS]["ms"], paired=True)
            entries[name]["ratio"] = {
                **dict(zip(("value", "low", "high"), ratio, strict=True)),
                "ours_is": stats.verdict(*ratio[1:]),
            }
    row = {"case": "op case", "operator": "op", "name": "case", "batch": 1,
           "unit": "sample", "bytes": 10**7, "flops": 10**6, "sweep": {}, "served_by": "cpu",
           "clock": "host", "in_cache": False, "bound": "memory", "bound_ms": 1.0,
           "contenders": entries}  # fmt: skip
    return {"format": 1, "suite": "cpu", "quick": False, "device": "cpu",
            "machine": machine.describe(CPU), "ceilings": CEILINGS, "rows": [row],
            "wrong": []}  # fmt: skip
