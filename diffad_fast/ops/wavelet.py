"""Discrete wavelet transforms of images, equal to PyWavelets in value and shape.

``wavelet`` is a name of ``pywt.wavelist(kind="discrete")`` or a ``pywt.Wavelet``; ``mode`` is one
of PyWavelets' border modes: zero, constant, symmetric, periodic, smooth, periodization, reflect,
antisymmetric, antireflect. Any other name raises ValueError with the closest ones. Images of any
size, also shorter than the filter; float32, bfloat16, float16 or float64; differentiable.
"""

from __future__ import annotations

import torch

from .. import native, reference
from ..reference import wavelet as rules
from . import checks
from .dispatch import Operator, kernel
from .layout import empty_4d

# The native operators are M along both axes, for the filters f and a border, and its adjoint M^T;
# see csrc/cpu/dwt2d.cpp. The inverse transform is M^T for the reconstruction filters, reversed.
# A border is a mode's index, or the one after: the inverse of periodization.
_BORDERS = {mode: index for index, mode in enumerate(rules.MODES)}
_CROPPED = len(rules.MODES)
CPU = torch.device("cpu")
LONGEST = 16  # of the filters that the Triton kernels keep in registers


def _native_dwt2d(x, wavelet, mode, operator=None, device=CPU):
    filters, _, _ = rules.filters(wavelet, torch.float64, device)
    length = filters.shape[1]
    border = _border(mode)
    _, _, height, width = x.shape
    if mode == "periodization":
        rows, columns = (height + 1) // 2, (width + 1) // 2
    else:
        rules.check_reflects(height, 2, mode)
        rules.check_reflects(width, 3, mode)
        rows, columns = (height + length - 1) // 2, (width + length - 1) // 2
    operator = operator or torch.ops.diffad_fast.dwt2d.default
    return _call(operator, (x,), filters, border, rows, columns)


def _native_idwt2d(coeffs, wavelet, mode, output_size=None, operator=None, device=CPU):
    _, _, filters = rules.filters(wavelet, torch.float64, device)
    length = filters.shape[1]
    border = _border(mode)
    a, h, v, d = coeffs
    if a is None or h is None or v is None or d is None:
        zeros = torch.zeros_like(next(band for band in coeffs if band is not None))
        coeffs = [zeros if band is None else band for band in coeffs]
    _, _, rows, columns = coeffs[0].shape
    if mode == "periodization":
        border, size = _CROPPED, (2 * rows, 2 * columns)
    else:
        rules.check_enough(columns, 3, length)
        rules.check_enough(rows, 2, length)
        border, size = _BORDERS["zero"], (2 * rows - length + 2, 2 * columns - length + 2)
    if output_size is not None:
        rules.check_crop(output_size, size)
        size = output_size
    operator = operator or torch.ops.diffad_fast.idwt2d.default
    return _call(operator, coeffs, filters, border, *size)


def _call(operator, tensors, *arguments):
    """The operator; past the autograd layer, half of a small call, where no gradient is wanted."""
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    ):
        return operator(*tensors, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*tensors, *arguments)


def _border(mode):
    if mode not in _BORDERS:
        rules.check_mode(mode)
    return _BORDERS[mode]


_kernel, _inverse_kernel = kernel("dwt2d", "dwt2d"), kernel("dwt2d", "idwt2d")


def _triton_dwt2d(x, wavelet, mode):
    return _native_dwt2d(x, wavelet, mode, _kernel, x.device)


def _triton_idwt2d(coeffs, wavelet, mode, output_size=None):
    device = next(band.device for band in coeffs if band is not None)
    return _native_idwt2d(coeffs, wavelet, mode, output_size, _inverse_kernel, device)


def _triton_refuses(tensors, wavelet, mode, output_size=None):
    """Left to the reference: long filters, and borders that are no index rule."""
    if mode in ("smooth", "antireflect"):
        return f"the Triton kernels do not have the mode {mode!r}"
    length = rules.filters(wavelet, torch.float64, CPU)[0].shape[1]
    if length > LONGEST:
        return f"the Triton kernels take filters up to {LONGEST}, not {length}"
    return None


_dwt2d = Operator(
    "dwt2d",
    reference.dwt2d,
    triton=_triton_dwt2d,
    **dict.fromkeys(native.implementations("dwt2d"), _native_dwt2d),
    refuses={"triton": _triton_refuses},
)
_idwt2d = Operator(
    "idwt2d",
    reference.idwt2d,
    triton=_triton_idwt2d,
    **dict.fromkeys(native.implementations("idwt2d"), _native_idwt2d),
    refuses={"triton": _triton_refuses},
)


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
    serve = _idwt2d.on(first.device, coeffs, wavelet, mode)
    return serve(coeffs, wavelet, mode, output_size)


def wavedec2(x, wavelet="haar", level=None, mode="periodization"):
    """Multi-level 2-D transform, as ``pywt.wavedec2``.

    x: (N,C,H,W). Returns [cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1)], coarse to fine.
    ``level`` is None for the largest useful one (``pywt.dwtn_max_level``) or an integer >= 0; a
    larger one than useful gives a warning. Raises what :func:`dwt2d` raises.
    """
    _check_image(x)
    if level is not None:
        level = checks.integer("level", level, 0, 64)
    return rules.decompose(_dwt2d, x, wavelet, level, mode)


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
    return rules.recompose(_idwt2d.on(low.device, coeffs, wavelet, mode), coeffs, wavelet, mode)


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
    like = first.shape, first.dtype, first.device
    for name, band in given[1:]:
        if isinstance(band, torch.Tensor) and (band.shape, band.dtype, band.device) == like:
            continue
        checks.shaped(name, band, first.shape, first.device)
        checks.same_dtype(name, band, first_name, first.dtype)
    return first


def _describe(value) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, (tuple, list)) else f"a {kind}"


def _fake_dwt2d(x, filters, border, rows, columns):
    return tuple(empty_4d(x, (*x.shape[:2], rows, columns)) for _ in range(4))


def _fake_idwt2d(a, h, v, d, filters, border, height, width):
    return empty_4d(a, (*a.shape[:2], height, width))


def _keep_dwt2d(ctx, inputs, output):
    x, ctx.filters, ctx.border, _, _ = inputs
    ctx.size = x.shape[2:]


def _keep_idwt2d(ctx, inputs, output):
    ctx.filters, ctx.border = inputs[4:6]
    ctx.size = inputs[0].shape[2:]


# Each is the adjoint of the other with the same filters and border.
def _dwt2d_backward(ctx, *grads):
    grad = torch.ops.diffad_fast.idwt2d(*grads, ctx.filters, ctx.border, *ctx.size)
    return grad, None, None, None, None


def _idwt2d_backward(ctx, grad):
    grads = torch.ops.diffad_fast.dwt2d(grad, ctx.filters, ctx.border, *ctx.size)
    return *grads, None, None, None, None


if native.loaded():
    for _name, _fake, _backward, _keep in (
        ("diffad_fast::dwt2d", _fake_dwt2d, _dwt2d_backward, _keep_dwt2d),
        ("diffad_fast::idwt2d", _fake_idwt2d, _idwt2d_backward, _keep_idwt2d),
    ):
        torch.library.register_fake(_name, _fake)
        torch.library.register_autograd(_name, _backward, setup_context=_keep)
