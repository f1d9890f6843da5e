"""Distances to nearest neighbours: how far a sample is from the normal ones."""

from __future__ import annotations

import torch

from .. import native, reference
from . import checks
from .dispatch import Operator

# The candidates of a row are kept in order, one by one.
LARGEST_COUNT = 64


def _native(x, sample, count):
    return torch.ops.diffad_fast.nearest_distances(x, sample, count)


def _refuses(x, sample, count):
    if count > LARGEST_COUNT:
        return f"it is written for up to {LARGEST_COUNT} neighbours, not {count}"
    if torch.is_grad_enabled() and (x.requires_grad or sample.requires_grad):
        return "it has no gradients"
    return None


_nearest_distances = Operator(
    "nearest_distances",
    reference.nearest_distances,
    **dict.fromkeys(native.implementations("nearest_distances"), _native),
    refuses={"cpu": _refuses},
)


def nearest_distances(x, sample, count):
    """Euclidean distances from rows to the nearest rows of a sample, as scikit-learn's
    ``NearestNeighbors.kneighbors`` gives them.

    x: (M,D), sample: (S,D) with D at least 1, of one dtype, any strides. count: how many, from 1 to
    S.

    Returns (M,count) in float64, in ascending order. Distances are those of the differences in
    float64, whatever the dtype.

    Natively on the CPU for up to 64 neighbours, without a matrix of distances: none is missed, a
    row of the sample is at 0 from itself, infinite distances follow finite ones and NaN both, and
    what is returned for a row does not depend on the others. Of float32 and narrower the search
    runs in float32, and again in float64 for rows where a bound of its rounding does not tell that
    none was missed. Elsewhere, and for gradients, the reference serves: it finds neighbours by a
    matrix product in float64, which cannot tell distances below some 1e-8 of the rows' lengths.
    Raises TypeError for dtypes and options, ValueError for shapes and options out of range.
    """
    checks.tensor("x", x, 2)
    checks.tensor("sample", sample, 2)
    checks.shaped("sample", sample, (len(sample), x.shape[1]), x.device)
    checks.same_dtype("sample", sample, "x", x.dtype)
    if x.shape[1] == 0:
        raise ValueError("x has no columns: rows of at least one number have distances")
    count = checks.integer("count", count, 1, len(sample))
    return _nearest_distances(x, sample, count)


def _fake(x, sample, count):
    return x.new_empty((x.shape[0], count), dtype=torch.float64)


if native.loaded():
    torch.library.register_fake("diffad_fast::nearest_distances", _fake)
