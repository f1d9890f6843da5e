"""Energies of the undecimated Haar transform on a grid of cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def band_energies(x, cell, levels):
    """x (N,C,H,W) -> (N,(6 levels + 1) C,H/cell,W/cell).

    The undecimated Haar transform (Shensa 1992) with low_0 = x, s = 2^(l-1) and level l from 1 on::

        a, b, c, d = low[y,x], low[y,x+s], low[y+s,x], low[y+s,x+s]      low = low_{l-1}
        low_l = a+b+c+d      bands (c+d)-(a+b), (b-a)+(d-c), (d-c)-(b-a), each times 4^-l

    has a coefficient at every pixel; that at (y,x) of a level stands over 2^l x 2^l pixels and is
    given to (y+s,x+s), half a pixel below and to the right of their middle, where no pixel is.
    Borders are mirrored, the outermost pixel not repeated. Of every cell: the mean squares of all
    bands, fine levels first, their largest squares, and the mean of x, with the channels innermost.
    In float32 at least.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    h, w = x.shape[2:]
    reach = 2 ** (levels - 1)
    low = F.pad(x, (reach,) * 4, mode="reflect")
    squares, peaks = [], []
    for level in range(1, levels + 1):
        shift = 2 ** (level - 1)
        left, right = low[..., :-shift], low[..., shift:]
        low, low_difference = _sum_and_difference(left + right, shift)
        details = low_difference, *_sum_and_difference(right - left, shift)
        start = reach - shift
        for band in details:
            band = band[..., start : start + h, start : start + w]
            cells = _cells(band.square(), cell)
            squares.append(cells.mean(dim=(3, 5)) * 16.0**-level)
            peaks.append(cells.amax(dim=(3, 5)) * 16.0**-level)
    return torch.cat([*squares, *peaks, _cells(x, cell).mean(dim=(3, 5))], dim=1)


def _cells(x, cell):
    """(N,C,h,cell,w,cell)."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // cell, cell, w // cell, cell)


def _sum_and_difference(x, shift):
    """Of rows that lie ``shift`` apart."""
    return [x[..., :-shift, :] + x[..., shift:, :], x[..., shift:, :] - x[..., :-shift, :]]
