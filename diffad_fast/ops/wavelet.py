"""Discrete wavelet transforms of images, equal to PyWavelets in value and shape.

``wavelet`` is a name of ``pywt.wavelist(kind="discrete")`` or a ``pywt.Wavelet``; ``mode`` is one
of PyWavelets' border modes: zero, constant, symmetric, periodic, smooth, periodization, reflect,
antisymmetric, antireflect. Any other name raises ValueError with the closest ones. Images of any
size, also shorter than the filter; float32, bfloat16, float16 or float64; differentiable.
"""

from __future__ import annotations

import torch

from .. import reference
from . import checks
from .dispatch import Operator

_dwt2d = Operator("dwt2d", reference.dwt2d)
_idwt2d = Operator("idwt2d", reference.idwt2d)
_wavedec2 = Operator("wavedec2", reference.wavedec2)
_waverec2 = Operator("waverec2", reference.waverec2)


def dwt2d(x, wavelet="haar", mode="periodization"):
    """One level of the 2-D discrete wavelet transform, as ``pywt.dwt2``.

    x: (N,C,H,W). Returns (cA, cH, cV, cD), each (N,C,H',W') in the dtype and memory format of
    ``x``, with H' = ceil(H/2) for ``periodization`` and floor((H + F - 1)/2) for every other
    mode, F being the filter's length; W' likewise.

    Raises TypeError for another dtype, ValueError for another number of dimensions, an empty
    image, an unknown wavelet or mode, and a side of 1 with reflect or antireflect.
    Source: Mallat 1989; borders as in PyWavelets (Lee et al. 2019).
    """
    _check_image(x)
    return _dwt2d(x, wavelet, mode)


def idwt2d(coeffs, wavelet="haar", mode="periodization", output_size=None):
    """Inverse of :func:`dwt2d`, as ``pywt.idwt2``.

    coeffs: (cA, cH, cV, cD), each (N,C,H',W'); a band may be None and counts as zeros. Returns
    (N,C,H,W) with H = 2H' for ``periodization``, else 2H' - F + 2: one more than the original if
    that was odd. ``output_size`` = (H, W) crops to the original size.

    Raises TypeError for bands of another or of different dtypes, ValueError for bands of
    different shapes or devices, too few coefficients for the filter, and an ``output_size``
    larger than what the coefficients give.
    """
    if not isinstance(coeffs, (tuple, list)) or len(coeffs) != 4:
        raise ValueError(f"coeffs must be (cA, cH, cV, cD), got {_describe(coeffs)}")
    first = _check_bands(coeffs, ("cA", "cH", "cV", "cD"))
    if output_size is not None and len(output_size) != 2:
        raise ValueError(f"output_size must be (H, W), got {output_size!r}")
    return _idwt2d.on(first.device)(coeffs, wavelet, mode, output_size)


def wavedec2(x, wavelet="haar", level=None, mode="periodization"):
    """Multi-level 2-D transform, as ``pywt.wavedec2``.

    x: (N,C,H,W). Returns [cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1)], coarse to fine.
    ``level`` is None for the largest useful one (``pywt.dwtn_max_level``) or an integer >= 0; a
    larger one than useful gives a warning. Raises what :func:`dwt2d` raises.
    """
    _check_image(x)
    if level is not None:
        checks.integer("level", level, 0, 64)
    return _wavedec2(x, wavelet, level, mode)


def waverec2(coeffs, wavelet="haar", mode="periodization"):
    """Inverse of :func:`wavedec2`, as ``pywt.waverec2``.

    coeffs: [cA_n, (cH_n, cV_n, cD_n), ...]; details may be None and count as zeros. A low band
    one row or column larger than its details is cropped. Returns (N,C,H,W), up to one row and
    one column larger than the image decomposed if that had odd sides. Raises what
    :func:`idwt2d` raises.
    """
    if not isinstance(coeffs, (tuple, list)) or not coeffs:
        raise ValueError(f"coeffs must be [cA, (cH, cV, cD), ...], got {_describe(coeffs)}")
    low, *levels = coeffs
    _check_image(low, "cA")
    for i, bands in enumerate(levels):
        number = len(levels) - i
        if not isinstance(bands, (tuple, list)) or len(bands) != 3:
            raise ValueError(f"level {number} must be (cH, cV, cD), got {_describe(bands)}")
        if any(band is not None for band in bands):
            names = [f"{kind} of level {number}" for kind in ("cH", "cV", "cD")]
            first = _check_bands(bands, names)
            checks.on_device(f"level {number}", first, low.device)
            checks.same_dtype(f"level {number}", first, "cA", low.dtype)
    return _waverec2.on(low.device)(coeffs, wavelet, mode)


def _check_image(x, name="x"):
    checks.tensor(name, x, 4)
    if 0 in x.shape[2:]:
        raise ValueError(f"{name} has no pixels: shape {tuple(x.shape)}")


def _check_bands(bands, names) -> torch.Tensor:
    """The first band that is not None, after a check that the others are like it."""
    given = [(n, band) for n, band in zip(names, bands, strict=True) if band is not None]
    if not given:
        raise ValueError(f"{', '.join(names)} are all None: give at least one band")
    first_name, first = given[0]
    _check_image(first, first_name)
    for name, band in given[1:]:
        checks.shaped(name, band, first.shape, first.device)
        checks.same_dtype(name, band, first_name, first.dtype)
    return first


def _describe(value) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, (tuple, list)) else f"a {kind}"
