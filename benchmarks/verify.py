"""No time for a wrong result: every contender is held against the exact one first."""

from __future__ import annotations

import torch

from .case import Case, Contender


def wrong(case: Case, contender: Contender, exact, output) -> str | None:
    """What is wrong with ``output``, or None."""
    if contender.check:
        return contender.check(output)
    tolerance = case.tolerance if contender.tolerance is None else contender.tolerance
    return difference(exact, output, tolerance)


def difference(exact, output, tolerance: float) -> str | None:
    """How ``output`` differs from ``exact`` by more than ``tolerance`` of the largest value, or
    None."""
    expected, found = list(_arrays(exact)), list(_arrays(output))
    if len(expected) != len(found):
        return f"{len(found)} results instead of {len(expected)}"
    for want, got in zip(expected, found, strict=True):
        if want.shape != got.shape:
            return f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        if not want.numel():
            continue
        scale = float(want.abs().max())
        error = float((got.to(want.device) - want).abs().max()) / (scale or 1.0)
        if not error <= tolerance:  # NaN is not
            return f"error {error:.1e} of the largest value, {tolerance:.0e} is allowed"
    return None


def finite(output) -> str | None:
    """The check of a contender that computes something else, whose result may be no tensor."""
    found = all(torch.isfinite(values).all() for values in _arrays(output))
    return None if found else "values that are not finite"


def _arrays(value):
    """The numbers of an output in float64, one tensor after another, where they are."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, torch.Tensor):
        yield value.detach().double()
    else:
        yield torch.as_tensor(value, dtype=torch.float64)
