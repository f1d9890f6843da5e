"""No time for a wrong result: every contender is held against the exact one first."""

from __future__ import annotations

import numpy as np
import torch

from .case import Case, Contender


def wrong(case: Case, contender: Contender, exact, output) -> str | None:
    """What is wrong with ``output``, or None."""
    if contender.check:
        return contender.check(output)
    tolerance = case.tolerance if contender.tolerance is None else contender.tolerance
    expected, found = list(_arrays(exact)), list(_arrays(output))
    if len(expected) != len(found):
        return f"{len(found)} results instead of {len(expected)}"
    for want, got in zip(expected, found, strict=True):
        if want.shape != got.shape:
            return f"shape {got.shape} instead of {want.shape}"
        scale = np.abs(want).max(initial=0.0)
        error = np.abs(got - want).max(initial=0.0) / (scale or 1.0)
        if not error <= tolerance:  # NaN is not
            return f"error {error:.1e} of the largest value, {tolerance:.0e} is allowed"
    return None


def _arrays(value):
    """The numbers of an output in float64, one array after another."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, torch.Tensor):
        yield value.detach().cpu().double().numpy()
    else:
        yield np.asarray(value, dtype=np.float64)
