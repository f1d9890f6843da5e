"""What counts as wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.case import Case, Contender
from benchmarks.verify import finite, wrong


@pytest.mark.parametrize(
    "output, reason",
    [
        (torch.zeros(3), "error"),
        (torch.ones(4), "shape"),
        ((torch.ones(3), torch.ones(3)), "results"),
        (torch.full((3,), torch.nan), "nan"),
    ],
)
def test_what_counts_as_wrong(output, reason):
    case = Case("op", "name", lambda device: (), lambda inputs: None, {})
    assert reason in wrong(case, Contender(lambda: None), np.ones(3), output)
    assert wrong(case, Contender(lambda: None), np.ones(3), torch.ones(3) + 1e-6) is None


@pytest.mark.parametrize(
    "output",
    [1.0, np.float32(1), np.ones(3), torch.ones(3), (torch.ones(2), 1.0), (np.ones((1, 2)), [1.0])],
)
def test_finite_looks_at_every_number_of_whatever_kind(output):
    def spoiled(value):
        if isinstance(value, (tuple, list)):
            return type(value)((*value[:-1], spoiled(value[-1])))
        return value * float("nan")

    assert finite(output) is None
    assert finite(spoiled(output)) == "values that are not finite"
