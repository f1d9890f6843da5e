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

Since a packed tile is in registers with its channels known, what follows in a detector rides along:
``standardised_packet`` subtracts each channel's mean and divides by its deviation, and
``noised_packet`` then noises the result as kernels/q_sample.py does. Image and noise are read once,
input and target of the network written once, in channels_last.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.diffusion import PREDICTION_TYPES
from ..ops.haar import empty_packed, empty_unpacked, keep_level
from ..ops.layout import is_channels_last
from .q_sample import min_snr
from .registration import cdiv, launch, operator, source, widened


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
def _haar(image, packed, mean, deviation, noise, t, alphas_cumprod, target, weight,
          rows: tl.int32, columns: tl.int32, i_n: tl.int64, i_c, i_h: tl.int64, i_w,
          p_n: tl.int64, p_c, p_h: tl.int64, p_w, z_n: tl.int64, z_c, z_h: tl.int64, z_w,
          snr_limit, CHANNELS: tl.constexpr, LEVEL: tl.constexpr, PACK: tl.constexpr,
          KIND: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
          LANES: tl.constexpr):  # fmt: skip
    """image (N, CHANNELS, R rows, R columns) -> packed (N, R R CHANNELS, rows, columns), or back.

    With a mean the coefficients are standardised, with a KIND, an index into PREDICTION_TYPES, they
    are noised: packed is then x_t. Target (x0 or v) has its strides. Unit strides are constants,
    and sizes and strides that divide by 16 compile apart from others: so the compiler sees runs and
    masks that it can take as vectors.
    """
    SIDE: tl.constexpr = 2**LEVEL
    program = tl.program_id(0)
    across, down = tl.cdiv(columns, BLOCKS), tl.cdiv(rows, ROWS)
    GROUPS: tl.constexpr = (CHANNELS + LANES - 1) // LANES
    first = program % (across * down * GROUPS) == 0
    b0, program = (program % across).to(tl.int64) * BLOCKS, program // across
    y0, program = (program % down).to(tl.int64) * ROWS, program // down
    c = program % GROUPS * LANES + tl.arange(0, LANES)
    n = (program // GROUPS).to(tl.int64)

    y = y0 * SIDE + tl.arange(0, ROWS * SIDE)
    x = b0 * SIDE + tl.arange(0, BLOCKS * SIDE)
    there = (y < tl.cast(rows, tl.int64) * SIDE)[:, None, None] & (c < CHANNELS)
    there = there & (x < tl.cast(columns, tl.int64) * SIDE)[:, None]
    samples = (y * i_h)[:, None, None] + (x * i_w)[:, None] + c.to(tl.int64) * i_c + n * i_n

    row = (y0 + tl.arange(0, ROWS))[:, None, None, None]
    block = (b0 + tl.arange(0, BLOCKS))[:, None, None]
    channel = (tl.arange(0, SIDE * SIDE) * CHANNELS)[:, None] + c
    real = (row < rows) & (block < columns) & (c < CHANNELS)
    bands = row * p_h + block * p_w + channel.to(tl.int64) * p_c + n * p_n

    if PACK:
        value = widened(tl.load(image + samples, there, 0.0))
        for stage in tl.static_range(LEVEL):
            value = _analysed(value, 4**stage, SIDE >> stage + 1, ROWS, BLOCKS, LANES)
        value = tl.reshape(value, (ROWS, BLOCKS, SIDE * SIDE, LANES)) * (1.0 / SIDE)
        if mean is not None:
            value -= widened(tl.load(mean + channel, c < CHANNELS, 0.0)).to(value.dtype)
            value /= widened(tl.load(deviation + channel, c < CHANNELS, 1.0)).to(value.dtype)
        if KIND is not None:
            alpha = widened(tl.load(alphas_cumprod + tl.load(t + n)))
            if value.dtype == tl.float64:
                alpha = alpha.to(tl.float64)
            tl.store(weight + n, min_snr(alpha, snr_limit, KIND), first)
            # 1 - abar cancels near 1 and is taken in the table's precision.
            s, e = tl.sqrt(alpha.to(value.dtype)), tl.sqrt((1.0 - alpha).to(value.dtype))
            noised = row * z_h + block * z_w + channel.to(tl.int64) * z_c + n * z_n
            z = widened(tl.load(noise + noised, real, 0.0)).to(value.dtype)
            if KIND == 1:
                tl.store(target + bands, value.to(target.dtype.element_ty), real)
            elif KIND == 2:
                tl.store(target + bands, (s * z - e * value).to(target.dtype.element_ty), real)
            value = s * value + e * z
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


def _run(
    image: Tensor, packed: Tensor, level: int, pack: bool, standard=(None, None),
    noising=(None, None, None, None, None), kind: int | None = None, snr_limit: float = 0.0,
) -> None:  # fmt: skip
    """Fill ``packed`` from ``image``, or the other way round. standard: mean and deviation;
    noising: noise, t, table, target and weight, by ``kind``."""
    filled = packed if pack else image
    if filled.numel() == 0:
        return
    n, channels = image.shape[:2]
    rows, columns = packed.shape[2:]
    noise = noising[0]
    strides = (0, 0, 0, 0) if noise is None else noise.stride()
    if noise is not None and len(noise) < n:
        strides = (0, *strides[1:])
    launch(
        _haar, _configs(level, channels, is_channels_last(filled)),
        lambda meta: (
            n * cdiv(channels, meta["LANES"]) * cdiv(rows, meta["ROWS"])
            * cdiv(columns, meta["BLOCKS"]),
        ),
        image, packed, *standard, *noising, rows, columns, *image.stride(), *packed.stride(),
        *strides, snr_limit, CHANNELS=channels, LEVEL=level, PACK=pack, KIND=kind,
    )  # fmt: skip


@operator(empty_packed)
def haar_pack(x: Tensor, level: int) -> Tensor:
    """See ``ops.haar_pack``."""
    y = empty_packed(x, level)
    _run(x, y, level, True)
    return y


@operator(empty_unpacked)
def haar_unpack(y: Tensor, level: int) -> Tensor:
    """See ``ops.haar_unpack``."""
    x = empty_unpacked(y, level)
    _run(x, y, level, False)
    return x


# The transform is orthonormal: its adjoint is its inverse.
def _backward_pack(ctx, grad):
    return haar_unpack(grad, ctx.level), None


def _backward_unpack(ctx, grad):
    return haar_pack(grad, ctx.level), None


haar_pack.register_autograd(_backward_pack, setup_context=keep_level)
haar_unpack.register_autograd(_backward_unpack, setup_context=keep_level)


def _fake_packet(x, mean, deviation, level):
    n, c, h, w = x.shape
    shape = (n, c * 4**level, h >> level, w >> level)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@operator(_fake_packet)
def standardise_packet(x: Tensor, mean: Tensor, deviation: Tensor, level: int) -> Tensor:
    y = _fake_packet(x, mean, deviation, level)
    _run(x, y, level, True, (mean.contiguous(), deviation.contiguous()))
    return y


def _fake_noised(x, mean, deviation, t, noise, alphas_cumprod, level, kind, snr_limit):
    y = _fake_packet(x, mean, deviation, level)
    target = x.new_empty(0) if kind == 0 else torch.empty_like(y)
    return y, target, x.new_empty(len(x), dtype=torch.float32)


@operator(_fake_noised)
def noise_packet(
    x: Tensor, mean: Tensor, deviation: Tensor, t: Tensor, noise: Tensor, alphas_cumprod: Tensor,
    level: int, kind: int, snr_limit: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x_t, target and weight; where the target is the noise it is empty."""
    y, target, weight = _fake_noised(
        x, mean, deviation, t, noise, alphas_cumprod, level, kind, snr_limit
    )
    _run(
        x, y, level, True, (mean.contiguous(), deviation.contiguous()),
        (noise, t.contiguous(), alphas_cumprod.contiguous(), target, weight), kind, snr_limit,
    )  # fmt: skip
    return y, target, weight


def standardised_packet(x, mean, deviation, level):
    """See ``ops.standardised_packet``."""
    return standardise_packet(x, mean, deviation, level)


def noised_packet(x, mean, deviation, t, noise, alphas, level, prediction_type, snr_limit):
    """See ``ops.noised_packet``."""
    kind = PREDICTION_TYPES.index(prediction_type)
    x_t, target, weight = noise_packet(x, mean, deviation, t, noise, alphas, level, kind, snr_limit)
    if kind == 0:
        target = noise.expand_as(x_t).to(x.dtype, memory_format=torch.channels_last)
    return x_t, target, weight


def _variant(
    pack: bool, level: int, channels_last: bool, dtype: str, kind: int | None, capability: int
):
    """For three channels, or one in channels_last, whose columns are dense as well. kind: of the
    target, for standardised coefficients, noised by contiguous noise."""
    channels = 1 if channels_last else 3
    types = {"image": f"*{dtype}", "packed": f"*{dtype}", "rows": "i32", "columns": "i32"}
    types |= dict.fromkeys(("i_n", "i_h", "p_n", "p_h", "z_n", "z_h"), "i64")
    types["snr_limit"] = "fp32"
    constants = {"CHANNELS": channels, "LEVEL": level, "PACK": pack, "KIND": kind, "i_w": 1}
    others = ("mean", "deviation", "noise", "t", "alphas_cumprod", "target", "weight")
    if kind is None:
        constants |= dict.fromkeys(others)
        types |= {"z_c": "i32", "z_w": "i32"}
    else:
        constants["z_w"] = 1
        types |= dict.fromkeys(others, "*fp32") | {"t": "*i64", "alphas_cumprod": "*fp64"}
        types["z_c"] = "i32"
    if channels_last:
        constants |= {"i_c": 1, "p_c": 1} | ({} if level else {"p_w": 1})
        types |= {"p_w": "i32"} if level else {}
    else:
        constants["p_w"] = 1
        types |= {"i_c": "i32", "p_c": "i32"}
    (config,) = _configs(level, channels, channels_last)
    return source(_haar, config, types, **constants)


COMPILE = {
    f"{'pack' if pack else 'unpack'}, level {level}, "
    f"{'channels_last' if last else 'contiguous'}, {dtype}": functools.partial(
        _variant, pack, level, last, dtype, None
    )
    for pack in (True, False)
    for level, last, dtype in (
        (1, False, "fp32"), (2, False, "fp32"), (3, False, "fp32"), (4, False, "fp32"),
        (2, True, "fp32"), (2, True, "bf16"),
    )
}  # fmt: skip
COMPILE |= {
    f"pack, standardise and noise, level {level}, channels_last, fp32": functools.partial(
        _variant, True, level, True, "fp32", 2
    )
    for level in (0, 2, 3)
}
