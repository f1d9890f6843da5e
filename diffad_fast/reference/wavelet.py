"""Discrete wavelet transforms of images, equal to PyWavelets in value and shape.

One level along one axis. With the decomposition filter f of length F, the signal x of length n
extended beyond its borders by the mode, and the coefficients c::

    c[o] = sum_j f[j] x[2 o + 1 - j],    o = 0 .. floor((n + F - 1) / 2) - 1
    c[o] = sum_j f[j] x[2 o + F/2 - j],  o = 0 .. ceil(n / 2) - 1             (periodization)

and its inverse, with the reconstruction filters g_lo, g_hi of length F and m coefficients a band::

    x[i] = sum_k a[k] g_lo[i + F - 2 - 2 k] + d[k] g_hi[i + F - 2 - 2 k],    i = 0 .. 2 m - F + 1
    x[i] = sum_k a[k] g_lo[i + F/2 - 1 - 2 k] + d[k] g_hi[i + F/2 - 1 - 2 k],  i = 0 .. 2 m - 1

where the second line is the periodization, in which k runs over the coefficients repeated with
period m. In two dimensions rows and columns are transformed in turn; cH is the detail along the
rows' index (horizontal structures), cV along the columns' index, cD along both.

Half precision is computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import difflib
import warnings

import torch
import torch.nn.functional as F

from .haar import in_memory_format, memory_format_of
from .modes import in_own_dtypes

MODES = (
    "zero", "constant", "symmetric", "periodic", "smooth", "periodization",
    "reflect", "antisymmetric", "antireflect",
)  # fmt: skip


@in_own_dtypes
def dwt2d(x, wavelet="haar", mode="periodization"):
    """(N,C,H,W) -> (cA, cH, cV, cD), each (N,C,H',W'); the equations are in the module's head."""
    check_mode(mode)
    dec, _, _ = filters(wavelet, _compute_dtype(x.dtype), x.device)
    n, c = x.shape[:2]
    y = x.to(dec.dtype).reshape(n * c, 1, *x.shape[2:])
    y = _analyse(y, dec, 2, mode)  # (N C, 2, H', W)
    y = _analyse(y.flatten(0, 1).unsqueeze(1), dec, 3, mode)  # (N C 2, 2, H', W')
    y = y.reshape(n, c, 4, *y.shape[2:]).to(x.dtype)
    # Band 2 i + j is filter i along H and filter j along W, 0 for low and 1 for high.
    return tuple(_with_format_of(x, y[:, :, band]) for band in (0, 2, 1, 3))


@in_own_dtypes
def idwt2d(coeffs, wavelet="haar", mode="periodization", output_size=None):
    """(cA, cH, cV, cD) -> (N,C,H,W), cropped to ``output_size`` from the top left if given.

    A band that is None counts as zeros.
    """
    check_mode(mode)
    given = next((band for band in coeffs if band is not None), None)
    if given is None:
        raise ValueError("all of cA, cH, cV and cD are None: give at least one band")
    _, rec, _ = filters(wavelet, _compute_dtype(given.dtype), given.device)
    n, c, h, w = given.shape
    a, horizontal, vertical, diagonal = (
        torch.zeros_like(given, dtype=rec.dtype) if band is None else band.to(rec.dtype)
        for band in coeffs
    )
    y = torch.stack([a, vertical, horizontal, diagonal], dim=2)
    y = _synthesise(y.reshape(n * c * 2, 2, h, w), rec, 3, mode)
    y = _synthesise(y.reshape(n * c, 2, h, y.shape[3]), rec, 2, mode)
    y = y.reshape(n, c, *y.shape[2:])
    if output_size is not None:
        rows, columns = output_size
        check_crop(output_size, tuple(y.shape[2:]))
        y = y[:, :, :rows, :columns]
    return _with_format_of(given, y.to(given.dtype))


def wavedec2(x, wavelet="haar", level=None, mode="periodization"):
    """(N,C,H,W) -> [cA_n, (cH_n, cV_n, cD_n), ..., (cH_1, cV_1, cD_1)]."""
    return decompose(dwt2d, x, wavelet, level, mode)


def waverec2(coeffs, wavelet="haar", mode="periodization"):
    """Inverse of :func:`wavedec2`; sub-bands that are None count as zeros.

    The image is up to one row and one column larger than the one decomposed, as in PyWavelets.
    """
    return recompose(idwt2d, coeffs, wavelet, mode)


def decompose(dwt2d, x, wavelet, level, mode):
    """:func:`wavedec2` by the given one-level transform."""
    check_mode(mode)
    length = filters(wavelet, torch.float64, torch.device("cpu"))[0].shape[1]
    # As pywt.dwtn_max_level: the low band is not shorter than the filter.
    most = min(max(0, (int(n) // (length - 1)).bit_length() - 1) for n in x.shape[2:])
    if level is None:
        level = most
    elif level < 0:
        raise ValueError(f"level is {level}: it must be 0 or more")
    elif level > most and not torch.compiler.is_compiling():  # which cannot warn
        warnings.warn(
            f"level {level} is more than the {most} that a {x.shape[2]}x{x.shape[3]} image and a "
            f"filter of length {length} allow: borders affect every coefficient",
            stacklevel=3,  # whoever called wavedec2
        )
    details = []
    for _ in range(level):
        x, *bands = dwt2d(x, wavelet, mode)
        details.append(tuple(bands))
    return [x, *reversed(details)]


def recompose(idwt2d, coeffs, wavelet, mode):
    """:func:`waverec2` by the given one-level transform."""
    x, *levels = coeffs
    for bands in levels:
        shape = next((band.shape for band in bands if band is not None), x.shape)
        # An odd size comes back one too large from the level below.
        rows, columns = (a - (a == d + 1) for a, d in zip(x.shape[2:], shape[2:], strict=True))
        x = idwt2d((x[:, :, :rows, :columns], *bands), wavelet, mode)
    return x


def _analyse(x, filters, axis, mode):
    """(B,1,H,W) -> (B,2,H,W), low and high band, with ``axis`` (2 or 3) filtered and halved."""
    n, length = x.shape[axis], filters.shape[1]
    if mode == "periodization":
        count, before = (n + 1) // 2, length // 2 - 1
    else:
        count, before = (n + length - 1) // 2, length - 2
    # conv2d correlates: output o covers the extended samples 2 o - before + (0 .. length-1).
    after = 2 * (count - 1) - before + length - n
    x = _extend(x, axis, before, after, mode)
    return F.conv2d(x, _along(axis, filters.flip(1)), stride=_on(axis, 2, 1))


def _synthesise(x, filters, axis, mode):
    """(B,2,H,W), low and high band -> (B,1,H,W) with ``axis`` (2 or 3) upsampled and filtered."""
    m, length = x.shape[axis], filters.shape[1]
    if mode == "periodization":
        # Output i needs the coefficients from i/2 - F/4 to i/2 + F/4.
        repeat = length // 4
        x = _extend(x, axis, repeat, repeat, "periodic")
        crop = 2 * repeat + length // 2 - 1
    else:
        crop = length - 2
        check_enough(m, axis, length)
    return F.conv_transpose2d(
        x, _along(axis, filters), stride=_on(axis, 2, 1), padding=_on(axis, crop, 0)
    )


def _extend(x, axis, before, after, mode):
    """``x`` with ``before`` and ``after`` (may be 0) more samples along ``axis``, by ``mode``.

    Each mode is a rule for any index i, so that a filter longer than the signal, which sees
    several reflections of it, needs no case of its own.
    """
    if before == 0 and after == 0:
        return x
    n = x.shape[axis]
    if mode == "zero":
        return F.pad(x, (0, 0, before, after) if axis == 2 else (before, after))
    i = torch.arange(-before, n + after, device=x.device)

    def sample(index):
        return x.index_select(axis, index)

    def weights(values):
        return values.to(x.dtype).reshape((-1, 1) if axis == 2 else (1, -1))

    if mode == "constant":
        return sample(i.clamp(0, n - 1))
    if mode == "periodic":
        return sample(i % n)
    if mode == "periodization":  # an odd length is first made even by repeating the last sample
        return sample((i % (n + n % 2)).clamp(max=n - 1))
    if mode in ("symmetric", "antisymmetric"):  # c b a | a b c | c b a, period 2 n
        r = i % (2 * n)
        y = sample(torch.minimum(r, 2 * n - 1 - r))
        return y if mode == "symmetric" else y * weights(torch.where(r < n, 1, -1))
    first, last = x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1)
    if mode == "smooth":  # the straight line through the two outermost samples
        y = sample(i.clamp(0, n - 1))
        if n == 1:
            return y
        y = y + weights(i.clamp(max=0)) * (x.narrow(axis, 1, 1) - first)
        return y + weights((i - (n - 1)).clamp(min=0)) * (last - x.narrow(axis, n - 2, 1))
    check_reflects(n, axis, mode)
    # c b | a b c | b a, period 2 n - 2
    period = 2 * n - 2
    r = i % period
    y = sample(torch.minimum(r, period - r))
    if mode == "reflect":
        return y
    # antireflect: point reflections e(-i) = 2 first - e(i) and e(n-1+i) = 2 last - e(n-1-i), hence
    # e(i + period) = e(i) + 2 (last - first).
    turned = (r >= n).long()
    periods = torch.div(i, period, rounding_mode="floor")
    y = weights(1 - 2 * turned) * y + weights(2 * (turned + periods)) * last
    return y - weights(2 * periods) * first


def _on(axis, value, other):
    return (value, other) if axis == 2 else (other, value)


def _along(axis, filters):
    """Filters (2,F) as a convolution's weight along ``axis``: (2,1,F,1) or (2,1,1,F)."""
    return filters[:, None, :, None] if axis == 2 else filters[:, None, None, :]


def _compute_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def _with_format_of(x, y):
    """``y`` in channels_last if ``x`` is."""
    if memory_format_of(x) == torch.channels_last:
        return in_memory_format(y, torch.channels_last)
    return y


def check_mode(mode):
    if mode not in MODES:
        close = difflib.get_close_matches(str(mode).lower(), MODES, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose {', '.join(MODES)}"
        raise ValueError(f"unknown border mode {mode!r}: {hint}")


def check_reflects(n, axis, mode):
    if n == 1 and mode in ("reflect", "antireflect"):
        raise ValueError(f"mode {mode!r} needs at least 2 samples along axis {axis}, got 1")


def check_enough(m, axis, length):
    if 2 * m < length - 1:
        raise ValueError(
            f"{m} coefficients along axis {axis} are too few for a filter of length {length}: "
            f"use the wavelet and mode of the decomposition"
        )


def check_crop(output_size, size):
    if not all(1 <= crop <= whole for crop, whole in zip(output_size, size, strict=True)):
        raise ValueError(
            f"output_size {tuple(output_size)} does not fit: these coefficients give "
            f"{size}, which can only be cropped"
        )


def as_wavelet(wavelet):
    import pywt

    if isinstance(wavelet, pywt.Wavelet):
        return wavelet
    if not isinstance(wavelet, str):
        raise TypeError(f"wavelet must be a name or a pywt.Wavelet, got {type(wavelet).__name__}")
    try:
        return pywt.Wavelet(wavelet)
    except ValueError:
        close = difflib.get_close_matches(wavelet.lower(), pywt.wavelist(kind="discrete"), n=3)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else 'pywt.wavelist(kind="discrete") lists the names'
        )
        raise ValueError(f"unknown discrete wavelet {wavelet!r}: {hint}") from None


# A plain dictionary, which torch.compile can read.
_named_filters: dict[tuple, tuple[torch.Tensor, ...]] = {}


def filters(wavelet, dtype, device):
    """Low and high filters, each pair (2,F): of decomposition, of reconstruction, and the latter
    reversed."""
    if not isinstance(wavelet, str):
        return _bank(wavelet, dtype, device)
    key = (wavelet, dtype, device)
    known = _named_filters.get(key)
    if known is None:
        known = _bank(wavelet, dtype, device)
        # Not what a trace has in a tensor's place.
        if type(known[0]) is torch.Tensor and not torch.compiler.is_compiling():
            _named_filters[key] = known
    return known


def _bank(wavelet, dtype, device):
    dec_lo, dec_hi, rec_lo, rec_hi = as_wavelet(wavelet).filter_bank
    with torch.inference_mode(False):  # the cached filters must serve autograd later
        banks = [[dec_lo, dec_hi], [rec_lo, rec_hi]]
        banks = torch.tensor(banks, dtype=torch.float64, device="cpu")
        dec, rec = banks.to(device=device, dtype=dtype).unbind()
        return dec, rec, rec.flip(1)


def traced_as_constant(function):
    """As torch.compiler.assume_constant_result, which imports all of the compiler: torch.compile
    calls ``function``, here PyWavelets, instead of tracing it."""
    function._dynamo_marked_constant = True


traced_as_constant(_bank)
