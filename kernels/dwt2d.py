"""Separable 2-D wavelet transforms, both axes in one pass; no intermediate reaches memory.

The operators are those of csrc/cpu/dwt2d.cpp: ``dwt2d`` is M along both axes, for two filters f of
length F and a border, ``idwt2d`` its adjoint. With e running over the signal x as the border
extends it, a coefficient is ::

    c[o] = sum_t f[F-1-t] x[2 o - B + t],    B = F - 2, or F/2 - 1 for periodization

and the adjoint, whose sum over o has F/2 terms since t = e + B - 2 o must lie in the filter, ::

    x[e] = sum_o f[F-1-(e + B - 2 o)] c[o].

A program owns some columns of the result (of one channel, or of neighbouring channels in
channels_last) and a share of its rows. It walks down the rows of the source that these need,
filters each along W once, and keeps the last ones in registers, where they are filtered along H.

Gradients gather: they are the other operator. A border that repeats samples sends several e to one
sample; its adjoint first gives the gradient of the extended signal, then adds what lies beyond the
borders by a small matrix product, in a fixed order and without atomics.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import empty_4d, is_channels_last
from ..reference import wavelet as rules
from ..reference.modes import in_own_dtypes
from .registration import cdiv, launch, operator, source, wide, widened

# Borders are numbers, see _extended: a mode's index and, for the inverse of periodization, the one
# after: period 2 rows, of which some may have been cropped.
ZERO, SYMMETRIC, PERIODIZATION = map(rules.MODES.index, ("zero", "symmetric", "periodization"))
CROPPED = len(rules.MODES)


@triton.jit
def _modulo(i, period):
    return (i % period + period) % period


@triton.jit
def _extended(i, size, count, BORDER: tl.constexpr):
    """Index of the sample that lies at i of the extended signal, and its factor: 1, -1 or 0."""
    one = i * 0 + 1
    if BORDER == 0:
        return i, (i >= 0) & (i < size)
    elif BORDER == 1:
        return tl.minimum(tl.maximum(i, 0), size - 1), one
    elif BORDER == 2:
        r = _modulo(i, 2 * size)
        return tl.minimum(r, 2 * size - 1 - r), one
    elif BORDER == 3:
        return _modulo(i, size), one
    elif BORDER == 5:  # an odd length is made even by repeating the last sample
        return tl.minimum(_modulo(i, size + size % 2), size - 1), one
    elif BORDER == 6:
        r = _modulo(i, 2 * size - 2)
        return tl.minimum(r, 2 * size - 2 - r), one
    elif BORDER == 7:
        r = _modulo(i, 2 * size)
        return tl.minimum(r, 2 * size - 1 - r), tl.where(r < size, one, -one)
    else:
        r = _modulo(i, 2 * count)
        return r, r < size


@triton.jit
def _lanes(columns, images, share, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """Image, channel and column of each lane, which lanes exist, and the program's first row."""
    lanes = images * CHANNELS * columns
    blocks = tl.cdiv(lanes, BLOCK)
    program = tl.program_id(0)
    lane = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        channel, rest = lane % CHANNELS, lane // CHANNELS
        column, n = rest % columns, rest // columns
    else:
        column, rest = lane % columns, lane // columns
        channel, n = rest % CHANNELS, rest // CHANNELS
    return n, channel, column.to(tl.int32), lane < lanes, (program // blocks).to(tl.int32) * share


@triton.jit
def _place(n, channel, column, rows, columns, CHANNELS: tl.constexpr,
           CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Offsets of row 0 of a dense image and the distance between its rows."""
    if CHANNELS_LAST:
        return (n * rows * columns + column) * CHANNELS + channel, columns * CHANNELS
    return (n * CHANNELS + channel) * rows * columns + column, columns


@triton.jit
def _analyse(x, filters, a, h, v, d, images: tl.int64, height, width, rows: tl.int64,
             columns: tl.int64, x_n: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w: tl.int64,
             share: tl.int32, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
             LENGTH: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    images, x_w = tl.cast(images, tl.int64), tl.cast(x_w, tl.int64)
    rows, columns = tl.cast(rows, tl.int64), tl.cast(columns, tl.int64)
    n, channel, column, real, first = _lanes(columns, images, share, CHANNELS, CHANNELS_LAST, BLOCK)
    BEFORE: tl.constexpr = LENGTH // 2 - 1 if BORDER == 5 or BORDER == 9 else LENGTH - 2
    x += n * x_n + channel * x_c
    zero = widened(tl.zeros((BLOCK,), x.dtype.element_ty))
    places, factors, low_taps, high_taps = (), (), (), ()
    for t in tl.static_range(LENGTH):
        i, factor = _extended(2 * column - BEFORE + t, width, tl.cast(columns, tl.int32), BORDER)
        places = places + (i * x_w,)
        factors = factors + (factor,)
        low_taps = low_taps + (tl.load(filters + LENGTH - 1 - t).to(zero.dtype),)
        high_taps = high_taps + (tl.load(filters + 2 * LENGTH - 1 - t).to(zero.dtype),)
    lows, highs = (), ()
    for _ in tl.static_range(LENGTH):
        lows = lows + (zero,)
        highs = highs + (zero,)
    place, row = _place(n, channel, column, rows, columns, CHANNELS, CHANNELS_LAST)
    # Each step filters two rows along W and shifts them into the window of the last LENGTH.
    LEAD: tl.constexpr = (LENGTH - 2) // 2
    for step in range(0, share + LEAD):
        for half in tl.static_range(2):
            e = 2 * (first + step) + half - BEFORE
            line, row_factor = _extended(e, height, tl.cast(rows, tl.int32), BORDER)
            # The last program's rows may need nothing any more.
            needed = real & (row_factor != 0) & (e < 2 * rows + LENGTH)
            low, high = zero, zero
            for t in tl.static_range(LENGTH):
                mask = needed & (factors[t] != 0)
                value = widened(tl.load(x + line.to(tl.int64) * x_h + places[t], mask, 0.0))
                if BORDER == 7:
                    value = value * (factors[t] * row_factor).to(zero.dtype)
                low += low_taps[t] * value
                high += high_taps[t] * value
            lows = lows[1:] + (low,)
            highs = highs[1:] + (high,)
        o = first + step - LEAD
        ll, hl, lh, hh = zero, zero, zero, zero
        for t in tl.static_range(LENGTH):
            ll += low_taps[t] * lows[t]
            hl += high_taps[t] * lows[t]
            lh += low_taps[t] * highs[t]
            hh += high_taps[t] * highs[t]
        there = real & (o >= first) & (o < rows)
        here = place + o * row
        tl.store(a + here, ll.to(a.dtype.element_ty), there)
        tl.store(h + here, hl.to(h.dtype.element_ty), there)
        tl.store(v + here, lh.to(v.dtype.element_ty), there)
        tl.store(d + here, hh.to(d.dtype.element_ty), there)


@triton.jit
def _synthesise(a, h, v, d, filters, x, images: tl.int64, height: tl.int64, width: tl.int64, rows,
                columns, c_n: tl.int64, c_c: tl.int64, c_h: tl.int64, c_w: tl.int64,
                share: tl.int32, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                LENGTH: tl.constexpr, BEFORE: tl.constexpr, WRAP: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """x[e] for e = 0 .. height - 1, in the equation's terms with BEFORE for B. share is even."""
    images, c_w = tl.cast(images, tl.int64), tl.cast(c_w, tl.int64)
    height, width = tl.cast(height, tl.int64), tl.cast(width, tl.int64)
    n, channel, column, real, first = _lanes(width, images, share, CHANNELS, CHANNELS_LAST, BLOCK)
    HALF: tl.constexpr = LENGTH // 2
    # t = e + BEFORE - 2 o = parity + 2 j at the coefficient o = (e + BEFORE) // 2 - j.
    parity = (column + BEFORE) % 2
    base = n * c_n + channel * c_c
    zero = widened(tl.zeros((BLOCK,), x.dtype.element_ty))
    places, exists, low_taps, high_taps = (), (), (), ()
    for j in tl.static_range(HALF):
        o = (column + BEFORE) // 2 - j
        if WRAP:
            o = _modulo(o, columns)
        places = places + (base + o * c_w,)
        exists = exists + (real & (o >= 0) & (o < columns),)
        tap = filters + LENGTH - 1 - parity - 2 * j
        low_taps = low_taps + (tl.load(tap).to(zero.dtype),)
        high_taps = high_taps + (tl.load(tap + LENGTH).to(zero.dtype),)
    # The filters themselves, for the rows: a step ends at an even and at an odd one.
    lows, highs, low_filter, high_filter = (), (), (), ()
    for _ in tl.static_range(HALF):
        lows = lows + (zero,)
        highs = highs + (zero,)
    for t in tl.static_range(LENGTH):
        low_filter = low_filter + (tl.load(filters + LENGTH - 1 - t).to(zero.dtype),)
        high_filter = high_filter + (tl.load(filters + 2 * LENGTH - 1 - t).to(zero.dtype),)
    place, row = _place(n, channel, column, height, width, CHANNELS, CHANNELS_LAST)
    # Each step filters a row of coefficients along W, shifts it into the window of the last HALF
    # and gives the two rows of the result that end there.
    start = (first + BEFORE) // 2 - (HALF - 1)
    for step in range(0, HALF + share // 2):
        line = start + step
        if WRAP:
            line = _modulo(line, rows)
        present = (line >= 0) & (line < rows)
        low, high = zero, zero
        for j in tl.static_range(HALF):
            here, mask = places[j] + line.to(tl.int64) * c_h, exists[j] & present
            low += low_taps[j] * widened(tl.load(a + here, mask, 0.0))
            low += high_taps[j] * widened(tl.load(v + here, mask, 0.0))
            high += low_taps[j] * widened(tl.load(h + here, mask, 0.0))
            high += high_taps[j] * widened(tl.load(d + here, mask, 0.0))
        lows = lows[1:] + (low,)
        highs = highs[1:] + (high,)
        for half in tl.static_range(2):
            e = 2 * (start + step) + half - BEFORE
            value = zero
            for j in tl.static_range(HALF):
                value += low_filter[half + 2 * j] * lows[HALF - 1 - j]
                value += high_filter[half + 2 * j] * highs[HALF - 1 - j]
            there = real & (e >= first) & (e < first + share) & (e < height)
            tl.store(x + place + e * row, value.to(x.dtype.element_ty), there)


BLOCK = 128
CONFIGS = [triton.Config({"BLOCK": BLOCK}, num_warps=4)]
# By their registers, some 80 of 65,536 in each of 128 threads.
PROGRAMS_AT_ONCE = 6  # on a multiprocessor


def _launch(kernel, lanes: int, rows: int, length: int, *args, **constants) -> None:
    """Run ``kernel`` on ``lanes`` columns, of which each program takes its share of ``rows``."""
    # Rows' worth of steps beyond its share.
    halo = (length - 2) // 2 if kernel is _analyse else length
    blocks, share = cdiv(lanes, BLOCK), _smallest_share(length)
    device = args[0].device
    if device.type == "cuda" and isinstance(blocks, int) and isinstance(rows, int):
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        share = shared_rows(blocks, rows, halo, _smallest_share(length), processors)
    grid = (blocks * cdiv(rows, share),)
    launch(kernel, CONFIGS, lambda _: grid, *args, share, LENGTH=length, **constants)


def _smallest_share(length: int) -> int:
    return 4 if length == 2 else 16


@functools.lru_cache(1024)
def shared_rows(blocks: int, rows: int, halo: int, least: int, processors: int) -> int:
    """Rows of a program, an even number from ``least`` on, where there are ``blocks`` of columns.
    Each needs ``halo`` rows more, and programs beyond those that run at once wait until the first
    are done. Of shares that take as long, the smallest."""

    def time(share: int) -> int:
        rounds = cdiv(blocks * cdiv(rows, share), PROGRAMS_AT_ONCE * processors)
        return rounds * (share + halo)

    return min(range(least, max(least, rows) + 2, 2), key=time)


def _fake_dwt2d(x, filters, border, rows, columns):
    return tuple(empty_4d(x, (*x.shape[:2], rows, columns)) for _ in range(4))


@operator(_fake_dwt2d)
def dwt2d(
    x: Tensor, filters: Tensor, border: int, rows: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """M along both axes; filters (2,F) on the device of ``x``, border as in :func:`_extended`."""
    bands = _fake_dwt2d(x, filters, border, rows, columns)
    n, channels, height, width = x.shape
    if x.numel() == 0:
        return bands
    length = filters.shape[1]
    _launch(
        _analyse, n * channels * columns, rows, length,
        x, filters, *bands, n, height, width, rows, columns, *x.stride(),
        CHANNELS=channels, CHANNELS_LAST=is_channels_last(bands[0]), BORDER=border,
    )  # fmt: skip
    return bands


def _fake_idwt2d(a, h, v, d, filters, border, height, width):
    return empty_4d(a, (*a.shape[:2], height, width))


@operator(_fake_idwt2d)
def idwt2d(
    a: Tensor, h: Tensor, v: Tensor, d: Tensor, filters: Tensor, border: int, height: int,
    width: int,
) -> Tensor:  # fmt: skip
    """The adjoint of :func:`dwt2d`; the four bands of one shape."""
    n, channels, rows, columns = a.shape
    length = filters.shape[1]
    if n * channels == 0:
        return _fake_idwt2d(a, h, v, d, filters, border, height, width)
    periodic = border in (PERIODIZATION, CROPPED)
    before = length // 2 - 1 if periodic else length - 2
    size, wrap = (height, width), periodic
    # Does a sample stand in several places of the extended signal?
    folded = border not in (ZERO, CROPPED) and not (
        border == PERIODIZATION and height % 2 == 0 and width % 2 == 0
    )
    if folded:
        size, wrap = (2 * (rows - 1) + length, 2 * (columns - 1) + length), False
    x = empty_4d(a, (n, channels, *size))
    if folded:
        x = x.to(wide(x))
    # One set of strides for the four bands.
    bands = [y if y.stride() == a.stride() else _like(y, a) for y in (a, h, v, d)]
    if any(y.stride() != bands[0].stride() for y in bands):
        bands = [_like(y, a) for y in bands]
    _launch(
        _synthesise, n * channels * size[1], size[0], length,
        *bands, filters, x, n, *size, rows, columns, *bands[0].stride(), CHANNELS=channels,
        CHANNELS_LAST=is_channels_last(x), BEFORE=0 if folded else before, WRAP=wrap,
    )  # fmt: skip
    if folded:
        mode = rules.MODES[border]
        x = _fold(_fold(x, 2, before, height, mode), 3, before, width, mode)
        x = _like(x, a).to(a.dtype)
    return x


def _like(y: Tensor, a: Tensor) -> Tensor:
    last = is_channels_last(a)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@in_own_dtypes
def _fold(x: Tensor, axis: int, before: int, n: int, mode: str) -> Tensor:
    """Adjoint of extending ``n`` samples along ``axis`` by ``before`` and as many as there are."""
    after = x.shape[axis] - before - n
    identity = torch.eye(n, dtype=x.dtype, device=x.device)[None, None]
    extension = rules._extend(identity, 2, before, max(after, 0), mode)[0, 0]
    outside = [*range(before), *range(before + n, x.shape[axis])]
    if not outside:
        return x.narrow(axis, before, n) if after >= 0 else x
    keep = torch.cat([extension[:before], extension[before + n :]])
    beyond = torch.cat(
        [x.narrow(axis, 0, before), x.narrow(axis, before + n, max(after, 0))], dim=axis
    )
    inside = x.narrow(axis, before, n)
    return inside + (keep.T @ beyond if axis == 2 else beyond @ keep)


def _setup_dwt2d(ctx, inputs, output):
    x, filters, ctx.border, _, _ = inputs
    ctx.save_for_backward(filters)
    ctx.size = x.shape[2:]


def _backward_dwt2d(ctx, *grads):
    (filters,) = ctx.saved_tensors
    grad = idwt2d(*grads, filters, ctx.border, *ctx.size)
    return grad, None, None, None, None


def _setup_idwt2d(ctx, inputs, output):
    ctx.border = inputs[5]
    ctx.save_for_backward(inputs[4])
    ctx.size = inputs[0].shape[2:]


def _backward_idwt2d(ctx, grad):
    (filters,) = ctx.saved_tensors
    grads = dwt2d(grad, filters, ctx.border, *ctx.size)
    return *grads, None, None, None, None


dwt2d.register_autograd(_backward_dwt2d, setup_context=_setup_dwt2d)
idwt2d.register_autograd(_backward_idwt2d, setup_context=_setup_idwt2d)


def _variant(kernel, length: int, dtype: str, capability: int):
    types = {p.name: f"*{dtype}" for p in kernel.params if not p.is_constexpr}
    types |= {p.name: p.annotation for p in kernel.params if p.annotation in ("i32", "i64")}
    sizes = ("height", "width") if kernel is _analyse else ("rows", "columns")
    types |= dict.fromkeys(sizes, "i32") | {"filters": "*fp64"}
    constants = {"CHANNELS": 3, "CHANNELS_LAST": False, "LENGTH": length}
    if kernel is _analyse:
        constants["BORDER"] = PERIODIZATION if length == 2 else SYMMETRIC
    else:
        constants |= {"BEFORE": max(length - 2, 0), "WRAP": length == 2}
    return source(kernel, CONFIGS[0], types, **constants)


COMPILE = {
    f"{kernel.__name__[1:]}, length {length}, {dtype}": functools.partial(
        _variant, kernel, length, dtype
    )
    for kernel in (_analyse, _synthesise)
    for length, dtype in ((2, "fp32"), (8, "fp32"), (8, "bf16"), (16, "fp32"))
}
