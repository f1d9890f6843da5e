"""What counts as wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.case import Case, Contender
from benchmarks.verify import wrong


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
