"""A Gaussian over images and maps as matrix products."""

from __future__ import annotations

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
