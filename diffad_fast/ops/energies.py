"""Energies of wavelet bands: what images look like to the token MLP."""

from __future__ import annotations

import torch

from .. import native, reference
from . import checks
from .dispatch import Operator

MAX_LEVEL = 12


def _native(x, cell, levels):
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.band_energies(x, cell, levels)
    return torch.ops.diffad_fast.band_energies(x, cell, levels)


_band_energies = Operator(
    "band_energies",
    reference.band_energies,
    **dict.fromkeys(native.implementations("band_energies"), _native),
)


def band_energies(x, cell, levels):
    """Mean and largest squares of wavelet bands on a grid of cells, and the mean of the image.

    x: (N,C,H,W), any strides, float32, bfloat16, float16 or float64. cell: the side of a cell in
    pixels; H and W divide by it. levels: 1 to 12, of the undecimated Haar transform (Shensa 1992),
    with 2^(levels-1) less than H and W. It has a coefficient at every pixel, whose mean squares
    vary far less from cell to cell than those of the few decimated coefficients in a cell.

    Returns (N,(6 levels + 1) C,H/cell,W/cell) in float32, float64 for float64: first the mean
    squares of the 3 ``levels`` bands, from fine to coarse, each level's in the order of
    differences along y, along x and both; then their largest squares in the same order; then the
    means of ``x``. Channels are innermost: feature k of channel c is k C + c. A band is normalised
    such that a coefficient is 1/4^level times the difference of sums of pixels, and stands half a
    pixel below and to the right of the middle of these. Borders are mirrored. The equations are in
    ``reference.band_energies``.

    Differentiable in x, by the reference. Results do not depend on the number of threads.
    Raises TypeError for dtypes and options, ValueError for shapes and options out of range.
    """
    checks.tensor("x", x, 4)
    cell = checks.integer("cell", cell, 1, 2**31 - 1)
    levels = checks.integer("levels", levels, 1, MAX_LEVEL)
    height, width = x.shape[2], x.shape[3]
    if height % cell or width % cell:
        raise ValueError(
            f"x is {height} x {width}, which must divide by the cell, {cell}: pad or crop it"
        )
    if min(height, width) <= 2 ** (levels - 1):
        raise ValueError(
            f"x is {height} x {width}, too small for {levels} levels: its sides must be larger "
            f"than {2 ** (levels - 1)}, or take fewer levels"
        )
    return _band_energies(x, cell, levels)


def _fake(x, cell, levels):
    n, c, h, w = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((n, (6 * levels + 1) * c, h // cell, w // cell), dtype=dtype)


if native.loaded():
    torch.library.register_fake("diffad_fast::band_energies", _fake)
