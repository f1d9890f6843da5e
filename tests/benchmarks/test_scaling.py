"""What processes that train together send."""

from __future__ import annotations

import os

import pytest

from benchmarks import scaling


def test_what_a_process_sends():
    """Of a vector in N parts a ring passes N - 1 parts twice; one process sends nothing."""
    assert scaling.sent(1_000_000, 1) == 0
    assert scaling.sent(1_000_000, 2) == 4 * 1_000_003
    assert scaling.sent(1_000_000, 4) == pytest.approx(2 * 3 * 4 * 1_000_003 / 4)
    row = {"network": "m", "ms": 100.0, "exchange_ms": 5.0, "parameters": 10**6, "threads": 1,
           "counted_bytes": None}  # fmt: skip
    two = row | {"processes": 2, "ms": 50.0, "counted_bytes": 4_100_000}
    text = scaling.lines([row | {"processes": 1}, two])
    assert text[-2] == "| m | 1 × 1 | 100 | 1.00× |  | 1,000,000 | 0.00 | not told |"
    assert text[-1] == "| m | 2 × 1 | 50 | 2.00× | 5 | 1,000,000 | 4.00 | 4.10 |"


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_processes_send_what_the_formula_says():
    one, threads, two = scaling.run(quick=True)
    assert (one["processes"], threads["threads"], two["processes"]) == (1, 2, 2)
    assert min(row["ms"] for row in (one, threads, two)) > 0
    if two["counted_bytes"] is None:
        pytest.skip("the system does not count bytes")
    assert two["counted_bytes"] == pytest.approx(scaling.sent(two["parameters"], 2), rel=0.02)
