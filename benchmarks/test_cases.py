"""The cases under pytest-benchmark: ``pytest benchmarks --benchmark-only``, on the CPU.

Also with ``--benchmark-compare``, ``--benchmark-json`` and ``-k``; one group a case. A contender
whose result is wrong fails instead of being timed.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases
from benchmarks.verify import wrong

CPU = torch.device("cpu")
CASES = list(cases.load((*cases.OPERATORS, "metrics", "training"), "cpu", quick=True))


@pytest.mark.parametrize(
    "case, name",
    [
        pytest.param(case, name, id=f"{case.key}-{name}".replace("×", "x"))
        for case in CASES
        for name, contender in case.contenders.items()
        if not contender.compiled
    ],
)
def test_case(benchmark, case, name):
    contender = case.contenders[name]
    benchmark.group = case.key
    benchmark.extra_info.update(contender.settings(CPU))
    inputs = case.inputs(CPU)
    prepared = contender.prepare(inputs)
    with torch.inference_mode(not case.gradients):
        assert not wrong(case, contender, case.exact(inputs), contender.run(*prepared))
        benchmark(contender.run, *prepared)
