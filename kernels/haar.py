"""Haar packets of up to four levels in one pass; no intermediate level reaches memory.

With R = 2^level, the coefficients of an R x R block are the Walsh-Hadamard transforms of its
samples along y and along x, divided by R (derived in csrc/common/haar.h). The finest level combines
samples that differ in the last bit of their row or column, the next one in the bit before, and so
on. A stage of the kernel takes these two bits off the rows and columns of its tile, sums and
subtracts over both, and puts the two bits of the result, "high along x" above "high along y", in
front of those found before: after ``level`` stages they are the band, the coarsest level most
significant, as :func:`diffad_fast.ops.haar_pack` numbers it. Unpacking runs the stages backwards.

A program takes ROWS x BLOCKS blocks of LANES channels: several neighbouring ones in channels_last,
otherwise one. On the side of the image it reads or writes whole runs of rows; on the packed side
runs of each band, or, in channels_last, one run that holds all bands. The compiler moves values
between threads, through shared memory, where a stage's bits do not lie within one.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.haar import empty_packed, empty_unpacked, keep_level
from ..ops.layout import is_channels_last
from .registration import launch, operator, source, widened


@triton.jit
def _butterfly(x):
    """Sums and differences over the last two axes (2, 2), unscaled; twice gives 4 times x."""
    a, b = tl.split(x)
    s0, s1 = tl.split(a + b)
    d0, d1 = tl.split(a - b)
    return tl.join(tl.join(s0 + s1, s0 - s1), tl.join(d0 + d1, d0 - d1))


@triton.jit
def _analysed(x, BANDS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
              LANES: tl.constexpr):  # fmt: skip
    """A stage: (ROWS 2 SIDE, BLOCKS, BANDS, 2 SIDE, LANES) -> (ROWS SIDE, .., 4 BANDS, SIDE, ..)"""
    x = tl.reshape(x, (ROWS * SIDE, 2, BLOCKS, BANDS, SIDE, 2, LANES))
    x = _butterfly(tl.permute(x, (0, 2, 3, 4, 6, 5, 1)))
    x = tl.permute(x, (0, 1, 5, 6, 2, 3, 4))
    return tl.reshape(x, (ROWS * SIDE, BLOCKS, 4 * BANDS, SIDE, LANES))


@triton.jit
def _synthesised(x, BANDS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
                 BLOCKS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """4 times the inverse of :func:`_analysed` for the same constants."""
    x = tl.reshape(x, (ROWS * SIDE, BLOCKS, 2, 2, BANDS, SIDE, LANES))
    x = _butterfly(tl.permute(x, (0, 1, 4, 5, 6, 2, 3)))
    x = tl.permute(x, (0, 6, 1, 2, 3, 5, 4))
    return tl.reshape(x, (ROWS * SIDE * 2, BLOCKS, BANDS, SIDE * 2, LANES))


@triton.jit
def _haar(image, packed, rows: tl.int32, columns: tl.int32, i_n: tl.int64, i_c, i_h: tl.int64, i_w,
          p_n: tl.int64, p_c, p_h: tl.int64, p_w, CHANNELS: tl.constexpr, LEVEL: tl.constexpr,
          PACK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
          LANES: tl.constexpr):  # fmt: skip
    """image (N, CHANNELS, R rows, R columns) -> packed (N, R R CHANNELS, rows, columns), or back.

    Unit strides are constants (i_c or i_w, p_c or p_w), from which the compiler sees the runs.
    """
    SIDE: tl.constexpr = 2**LEVEL
    program = tl.program_id(0)
    across, down = tl.cdiv(columns, BLOCKS), tl.cdiv(rows, ROWS)
    GROUPS: tl.constexpr = (CHANNELS + LANES - 1) // LANES
    b0, program = (program % across).to(tl.int64) * BLOCKS, program // across
    y0, program = (program % down).to(tl.int64) * ROWS, program // down
    c = program % GROUPS * LANES + tl.arange(0, LANES)
    n = (program // GROUPS).to(tl.int64)

    y = y0 * SIDE + tl.arange(0, ROWS * SIDE)
    x = b0 * SIDE + tl.arange(0, BLOCKS * SIDE)
    there = (y < rows.to(tl.int64) * SIDE)[:, None, None] & (c < CHANNELS)
    there = there & (x < columns.to(tl.int64) * SIDE)[:, None]
    samples = (y * i_h)[:, None, None] + (x * i_w)[:, None] + c.to(tl.int64) * i_c + n * i_n

    row, block = y0 + tl.arange(0, ROWS), b0 + tl.arange(0, BLOCKS)
    channel = (tl.arange(0, SIDE * SIDE) * CHANNELS)[:, None] + c
    real = (row < rows)[:, None, None, None] & (block < columns)[:, None, None] & (c < CHANNELS)
    bands = (row * p_h)[:, None, None, None] + (block * p_w)[:, None, None]
    bands += channel.to(tl.int64) * p_c + n * p_n

    if PACK:
        value = widened(tl.load(image + samples, there, 0.0))
        for stage in tl.static_range(LEVEL):
            value = _analysed(value, 4**stage, SIDE >> stage + 1, ROWS, BLOCKS, LANES)
        value = tl.reshape(value, (ROWS, BLOCKS, SIDE * SIDE, LANES)) * (1.0 / SIDE)
        tl.store(packed + bands, value.to(packed.dtype.element_ty), real)
    else:
        value = widened(tl.load(packed + bands, real, 0.0))
        for stage in tl.static_range(LEVEL - 1, -1, -1):
            value = _synthesised(value, 4**stage, SIDE >> stage + 1, ROWS, BLOCKS, LANES)
        value = tl.reshape(value, (ROWS * SIDE, BLOCKS * SIDE, LANES)) * (1.0 / SIDE)
        tl.store(image + samples, value.to(image.dtype.element_ty), there)


def _configs(level: int, channels: int, channels_last: bool) -> list[triton.Config]:
    """32 (16 at level 4) blocks or channels side by side, 2048 values (4096) or more in a tile."""
    side_by_side = 32 if level < 4 else 16
    lanes = min(triton.next_power_of_2(channels), side_by_side) if channels_last else 1
    sizes = {"ROWS": max(1, 64 >> 2 * level), "BLOCKS": side_by_side // lanes, "LANES": lanes}
    return [triton.Config(sizes, num_warps=4 if level < 4 else 8)]


def _run(image: Tensor, packed: Tensor, level: int, pack: bool) -> Tensor:
    """Fill one of the two from the other."""
    target = packed if pack else image
    if target.numel() == 0:
        return target
    n, channels = image.shape[:2]
    rows, columns = packed.shape[2:]
    launch(
        _haar, _configs(level, channels, is_channels_last(target)),
        lambda meta: (
            n * triton.cdiv(channels, meta["LANES"]) * triton.cdiv(rows, meta["ROWS"])
            * triton.cdiv(columns, meta["BLOCKS"]),
        ),
        image, packed, rows, columns, *image.stride(), *packed.stride(),
        CHANNELS=channels, LEVEL=level, PACK=pack,
    )  # fmt: skip
    return target


@operator(empty_packed)
def haar_pack(x: Tensor, level: int) -> Tensor:
    """See ``ops.haar_pack``."""
    return _run(x, empty_packed(x, level), level, True)


@operator(empty_unpacked)
def haar_unpack(y: Tensor, level: int) -> Tensor:
    """See ``ops.haar_unpack``."""
    return _run(empty_unpacked(y, level), y, level, False)


# The transform is orthonormal: its adjoint is its inverse.
def _backward_pack(ctx, grad):
    return torch.ops.diffad_fast_triton.haar_unpack(grad, ctx.level), None


def _backward_unpack(ctx, grad):
    return torch.ops.diffad_fast_triton.haar_pack(grad, ctx.level), None


haar_pack.register_autograd(_backward_pack, setup_context=keep_level)
haar_unpack.register_autograd(_backward_unpack, setup_context=keep_level)


def _variant(pack: bool, level: int, channels_last: bool, dtype: str, capability: int):
    """For three channels, or one in channels_last, whose columns are dense as well."""
    channels = 1 if channels_last else 3
    types = {"image": f"*{dtype}", "packed": f"*{dtype}", "rows": "i32", "columns": "i32"}
    types |= dict.fromkeys(("i_n", "i_h", "p_n", "p_h"), "i64")
    constants = {"CHANNELS": channels, "LEVEL": level, "PACK": pack, "i_w": 1}
    if channels_last:
        constants |= {"i_c": 1, "p_c": 1}
        types["p_w"] = "i32"
    else:
        constants["p_w"] = 1
        types |= {"i_c": "i32", "p_c": "i32"}
    (config,) = _configs(level, channels, channels_last)
    return source(_haar, config, types, **constants)


COMPILE = {
    f"{'pack' if pack else 'unpack'}, level {level}, "
    f"{'channels_last' if channels_last else 'contiguous'}, {dtype}": functools.partial(
        _variant, pack, level, channels_last, dtype
    )
    for pack in (True, False)
    for level, channels_last, dtype in (
        (1, False, "fp32"), (2, False, "fp32"), (3, False, "fp32"), (4, False, "fp32"),
        (2, True, "fp32"), (2, True, "bf16"),
    )
}  # fmt: skip
