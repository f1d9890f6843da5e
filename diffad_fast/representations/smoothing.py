"""A Gaussian over images and maps, and maps brought to the size of images, as matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..reference.maps import gaussian_blur


class GaussianSmoothing:
    """``gaussian_blur`` along both axes by a matrix each, made once for each size.

    A product with a (side,side) matrix takes a fraction of the time of a convolution with a kernel
    as long as that of the illumination, and of that of the many calls behind one on a small grid.
    """

    def __init__(self):
        self._matrices: dict[tuple, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """x (...,H,W) smoothed by a Gaussian of deviation ``sigma``, borders reflected."""
        if sigma == 0:
            return x
        rows, columns = (self._matrix(side, sigma, x) for side in x.shape[-2:])
        return rows @ x @ columns.T

    def _matrix(self, side: int, sigma: float, x: torch.Tensor) -> torch.Tensor:
        key = side, sigma, x.dtype, x.device
        if key not in self._matrices:
            unit = torch.eye(side, dtype=x.dtype, device=x.device)[:, :, None]
            self._matrices[key] = gaussian_blur(unit, sigma)[:, :, 0].T.contiguous()
        return self._matrices[key]


class Upsampling:
    """Maps to the size of images, bilinearly, by a matrix for each axis, made once for each size.

    offset: the pixels by which what a map says lies below and to the right of where it belongs;
    with 0 the values are those of ``torch.nn.functional.interpolate``.
    """

    def __init__(self, offset: float):
        self.offset = offset
        self._matrices: dict[tuple, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """x (...,h,w) as (...,*size), which is no smaller."""
        rows, columns = (self._matrix(*n, x) for n in zip(x.shape[-2:], size, strict=True))
        return rows @ x @ columns.T

    def _matrix(self, cells: int, side: int, x: torch.Tensor) -> torch.Tensor:
        key = cells, side, x.dtype, x.device
        if key not in self._matrices:
            pixel = torch.arange(side, dtype=torch.float64, device=x.device)
            place = (pixel + 0.5 + self.offset) * cells / side - 0.5  # in cells, from their middles
            place = place.clamp(0, cells - 1)[:, None]
            cell = torch.arange(cells, device=x.device)
            self._matrices[key] = (1 - (place - cell).abs()).clamp(min=0).to(x.dtype)
        return self._matrices[key]
