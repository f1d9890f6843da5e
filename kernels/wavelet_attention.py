"""Attention over the Haar sub-bands of blocks of pixels, in one kernel that reads raw pixels.

**Why the fusion is exact.** Let x_i be the vector of the P = 4^level pixels of block i (d channels
each) and T the orthonormal Haar transform of a block, T^T T = 1. With the gains w and g of a head,
one for each coefficient, ``reference.wavelet_attention`` computes

    S_ij = scale <T q_i, diag(w) T k_j>,   A = softmax_j(S),   o_i = T^T diag(g) sum_j A_ij T v_j

1. <T q_i, diag(w) T k_j> = <T^T diag(w) T q_i, k_j>: with q'_i = scale M_w q_i,
   M_w = T^T diag(w) T, the logits are inner products of q' with raw pixels. q' is formed once, in
   float32, before the loop over keys.
2. A mixes blocks and does not touch what is inside one: sum_j A_ij T v_j = T sum_j A_ij v_j. So the
   loop mixes raw pixels, u_i = sum_j A_ij v_j, and o_i = M_g u_i once after it.

So the loop is that of flash attention (Dao et al. 2022) over tokens of P d channels, which happen
to lie in P places; no sub-band and no score is ever in memory.

**Backward.** M_w and M_g are symmetric. With D_i = <o_i, do_i> = <u_i, M_g do_i> and
dP_ij = <M_g do_i, v_j>, dS_ij = A_ij (dP_ij - D_i):

    dq_i = scale M_w sum_j dS_ij k_j            dk_j = scale M_w sum_i dS_ij q_i
    dv_j = M_g sum_i A_ij do_i                  dP_ij = <do_i, M_g v_j>, S_ij = scale <q_i, M_w k_j>
    dw_c = scale sum_i (T q_i)_c (T sum_j dS_ij k_j)_c      dg_c = sum_i (T u_i)_c (T do_i)_c

One kernel owns blocks of queries and mixes q and do once; the other owns blocks of keys and mixes
k and v instead: again nothing is mixed inside a loop. Both compute A again from the logarithm of
the sum of exponentials that the forward kernel saved. No two programs write to one place, and the
gains' gradients are partial sums added in a fixed order: results repeat bit for bit.

**Inside a tile.** A tile (rows, P DP) holds a block in a row: channel c of position p (row by row)
at p DP + c, DP being d up to a power of two, at least 16 / P. Where blocks are transformed the
positions are P tiles (rows, DP) instead: then T is sums of whole tiles, and no thread needs what
another has. Tensors are read and written in their own strides; only channels must lie side by side.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..ops import checks
from . import registration
from .registration import DTYPES, capability, cdiv, launch, operator, shared_memory, source

SMALLEST = tl.constexpr(2.0**-126)  # of float32's normal numbers
LOG2_E = tl.constexpr(math.log2(math.e))
# For other sizes a kernel is compiled again only where its tiles cover all blocks (`are_whole`), or
# no longer do, and from WIDE_FROM on. Strides, of images, heads, rows and columns of the
# five tensors that a kernel may have, in units of ALIGN elements.
STRIDES = [f"{x}_{axis}" for x in "qkvog" for axis in "nhyx"]
SIZES = ["heads", "H", "W", *STRIDES]
INTERPRETED = tl.constexpr(registration.INTERPRETED)
# From here on offsets inside an image, in elements, or a token's number times the number of columns
# do not fit into 32 bits.
WIDE_FROM = 1 << 31
GROUP = tl.constexpr(16)  # queries of one partial sum; every BLOCK_M is a multiple


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in float32."""
    if INTERPRETED:  # its bfloat16 is an integer to tl.dot
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _haar(a, b, c, d):
    """One level: the pixels (or, the transform being symmetric, coefficients) of a 2 x 2 block.

    The coefficient that is high in y (x) takes the place of the odd row (column).
    """
    return (
        (a + b + c + d) * 0.5, (a - b + c - d) * 0.5, (a + b - c - d) * 0.5, (a - b - c + d) * 0.5
    )  # fmt: skip


@triton.jit
def _transform(x, LEVEL: tl.constexpr, INVERSE: tl.constexpr):
    """T, or T^T, of a tuple of 4^LEVEL tiles: the positions of a block, row by row."""
    if LEVEL == 1:
        y = _haar(x[0], x[1], x[2], x[3])
    else:
        # Level 1 inside each 2 x 2 corner of the 4 x 4 block, level 2 over the corners' lows.
        a0, a4, a8, a12 = x[0], x[2], x[8], x[10]
        if INVERSE:
            a0, a4, a8, a12 = _haar(a0, a4, a8, a12)
        a0, a1, a2, a3 = _haar(a0, x[1], x[4], x[5])
        a4, a5, a6, a7 = _haar(a4, x[3], x[6], x[7])
        a8, a9, a10, a11 = _haar(a8, x[9], x[12], x[13])
        a12, a13, a14, a15 = _haar(a12, x[11], x[14], x[15])
        if not INVERSE:
            a0, a4, a8, a12 = _haar(a0, a4, a8, a12)
        y = (a0, a1, a4, a5, a2, a3, a6, a7, a8, a9, a12, a13, a10, a11, a14, a15)
    return y


@triton.jit
def _weigh(x, gain, head, LEVEL: tl.constexpr):
    """diag(gain) x for a tuple of coefficients in the order of :func:`_transform`."""
    gain += head * (1 + 3 * LEVEL)
    y = ()
    for i in tl.static_range(4**LEVEL):
        # 2 for high in x, 1 for high in y: 0..3 = cA, cH, cV, cD. Level 2 has row and column in
        # two bits each, of which the lower says what level 1 did.
        band = (i >> LEVEL) % 2 + 2 * (i % 2)
        if LEVEL == 2:
            band = 3 + band if band > 0 else (i >> 3) + (i & 2)
        y = y + (x[i] * tl.load(gain + band).to(tl.float32),)
    return y


@triton.jit
def _split(x, ROWS: tl.constexpr, COUNT: tl.constexpr, DP: tl.constexpr):
    """x (ROWS, COUNT DP) as a tuple of COUNT tiles (ROWS, DP), one a position."""
    if COUNT == 1:
        y = (x,)
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COUNT // 2 * DP)), (0, 2, 1)))
        y = _split(a, ROWS, COUNT // 2, DP) + _split(b, ROWS, COUNT // 2, DP)
    return y


@triton.jit
def _image(x, n, head, stride_n, stride_h, ALIGN: tl.constexpr):
    """x at its image n and ``head``."""
    return x + (n.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h) * ALIGN


@triton.jit
def _blocks(
    tokens, H, W, stride_y, stride_x,
    LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of the first pixels of blocks ``tokens`` in their image, and which of these there
    are. Strides are in units of ALIGN elements, so that the compiler knows how wide it may read."""
    columns = W >> LEVEL
    # tokens // columns by a product with the reciprocal, rounded up by less than 1 / 2^BITS: exact
    # while tokens * columns < 2^BITS.
    BITS: tl.constexpr = 40 if WIDE else 31
    reciprocal = ((1 << BITS) + columns.to(tl.int64) - 1) // columns
    if WIDE:
        row = (tokens.to(tl.int64) * reciprocal) >> BITS
        stride_y, stride_x = tl.cast(stride_y, tl.int64), tl.cast(stride_x, tl.int64)
    else:  # one instruction
        row = (tokens.to(tl.uint32).to(tl.uint64) * reciprocal.to(tl.uint32).to(tl.uint64)) >> BITS
        row = row.to(tl.int32)
    column = tokens - row * columns
    offsets = row * (stride_y * (ALIGN << LEVEL)) + column * (stride_x * (ALIGN << LEVEL))
    return offsets, tokens < (H >> LEVEL) * columns


@triton.jit
def _position(x, i, stride_y, stride_x, LEVEL: tl.constexpr, ALIGN: tl.constexpr):
    """x at pixel i of its first block."""
    y = tl.cast(stride_y, tl.int64) * (i >> LEVEL)
    x_ = tl.cast(stride_x, tl.int64) * (i & ((1 << LEVEL) - 1))
    return x + (y + x_) * ALIGN


@triton.jit
def _load(
    x, tokens, H, W, stride_y, stride_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The tile (tokens, 4^LEVEL DP) of blocks ``tokens``, zero where there is nothing."""
    blocks, mask = _blocks(tokens, H, W, stride_y, stride_x, LEVEL, ALIGN, WIDE)
    e = tl.arange(0, DP << (2 * LEVEL))
    position = _position(x, e // DP, stride_y, stride_x, LEVEL, ALIGN)
    # The pointers of a block's channels stay the same in a loop over blocks.
    pointers = (position + e % DP)[None, :] + blocks[:, None]
    return tl.load(pointers, mask[:, None] & (e % DP < D)[None, :], 0.0)


@triton.jit
def _tile(
    H, W, stride_y, stride_x, BLOCK: tl.constexpr,
    DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of the tile (BLOCK, 4^LEVEL DP) of an image's first blocks, in elements."""
    blocks, _ = _blocks(
        tl.arange(0, BLOCK), H, W, stride_y, stride_x, LEVEL, ALIGN, WIDE
    )
    e = tl.arange(0, DP << (2 * LEVEL))
    y, x_ = e // DP >> LEVEL, e // DP & ((1 << LEVEL) - 1)
    if WIDE:
        stride_y, stride_x = tl.cast(stride_y, tl.int64), tl.cast(stride_x, tl.int64)
    return blocks[:, None] + ((y * stride_y + x_ * stride_x) * ALIGN + e % DP)[None, :]


@triton.jit
def _stream(
    x, offsets, tokens, row, column, H, W, stride_y, stride_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The tile of blocks ``tokens``, the first of which is (row, column), in a loop over tiles."""
    if WHOLE:
        if WIDE:
            stride_y, stride_x = tl.cast(stride_y, tl.int64), tl.cast(stride_x, tl.int64)
        x += (row * stride_y + column * stride_x) * (ALIGN << LEVEL)
        if D < DP:
            channel = tl.arange(0, DP << (2 * LEVEL)) % DP
            tile = tl.load(x + offsets, (channel < D)[None, :], 0.0)
        else:
            tile = tl.load(x + offsets)
    else:
        tile = _load(x, tokens, H, W, stride_y, stride_x, D, DP, LEVEL, ALIGN, WIDE)
    return tile


@triton.jit
def _first():
    """The first block, row and column, of the first tile: as tensors, which a loop can change."""
    zero = tl.program_id(0) * 0
    return zero, zero


@triton.jit
def _next(row, column, columns, BLOCK: tl.constexpr):
    """The first block of the next tile, where tiles are WHOLE."""
    column += BLOCK
    ends = column >= columns
    return tl.where(ends, row + tl.maximum(BLOCK // columns, 1), row), tl.where(ends, 0, column)


@triton.jit
def _load_positions(
    x, tokens, H, W, stride_y, stride_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The same as a tuple of 4^LEVEL tiles (tokens, DP), one a position, in float32."""
    blocks, mask = _blocks(tokens, H, W, stride_y, stride_x, LEVEL, ALIGN, WIDE)
    c = tl.arange(0, DP)
    mask = mask[:, None] & (c < D)[None, :]
    tiles = ()
    for i in tl.static_range(4**LEVEL):
        position = _position(x, i, stride_y, stride_x, LEVEL, ALIGN)
        found = tl.load((position + c)[None, :] + blocks[:, None], mask, 0.0)
        tiles = tiles + (found.to(tl.float32),)
    return tiles


@triton.jit
def _store_positions(
    x, tiles, tokens, H, W, stride_y, stride_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    blocks, mask = _blocks(tokens, H, W, stride_y, stride_x, LEVEL, ALIGN, WIDE)
    c = tl.arange(0, DP)
    mask = mask[:, None] & (c < D)[None, :]
    for i in tl.static_range(4**LEVEL):
        position = _position(x, i, stride_y, stride_x, LEVEL, ALIGN)
        value = tiles[i].to(x.dtype.element_ty)
        tl.store((position + c)[None, :] + blocks[:, None], value, mask)


@triton.jit
def _mix(tiles, gain, head, LEVEL: tl.constexpr):
    """T^T diag(gain) T of a tuple of pixels; the pixels where there is no gain."""
    if gain is not None:
        tiles = _weigh(_transform(tiles, LEVEL, False), gain, head, LEVEL)
        tiles = _transform(tiles, LEVEL, True)
    return tiles


@triton.jit
def _load_mixed(
    x, scratch, gain, tokens, head, H, W, x_y, x_x, s_y, s_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The tile T^T diag(gain) T x, in the dtype of x.

    It goes through memory, at a place of ``scratch`` that only this program writes: no exchange
    between threads is needed before, and only a tile that was loaded is given to wgmma from shared
    memory; any other stays in registers, too many of them.
    """
    if gain is not None:
        tiles = _load_positions(x, tokens, H, W, x_y, x_x, D, DP, LEVEL, ALIGN, WIDE)
        tiles = _mix(tiles, gain, head, LEVEL)
        tl.debug_barrier()
        _store_positions(scratch, tiles, tokens, H, W, s_y, s_x, D, DP, LEVEL, ALIGN, WIDE)
        tl.debug_barrier()
        tile = _load(scratch, tokens, H, W, s_y, s_x, D, DP, LEVEL, ALIGN, WIDE)
    else:
        tile = _load(x, tokens, H, W, x_y, x_x, D, DP, LEVEL, ALIGN, WIDE)
    return tile


@triton.jit(do_not_specialize=SIZES)
def _forward(
    q, k, v, out, mixed, lse, logit_gain, value_gain, scale, heads, H, W,
    q_n, q_h, q_y, q_x, k_n, k_h, k_y, k_x, v_n, v_h, v_y, v_x, o_n, o_h, o_y, o_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    CHANNELS: tl.constexpr = DP << (2 * LEVEL)
    tokens = (H >> LEVEL) * (W >> LEVEL)
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = tl.program_id(0) // tiles
    n, head = image // heads, image % heads
    first = (tl.program_id(0) % tiles) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)

    q, k = _image(q, n, head, q_n, q_h, ALIGN), _image(k, n, head, k_n, k_h, ALIGN)
    v, out = _image(v, n, head, v_n, v_h, ALIGN), _image(out, n, head, o_n, o_h, ALIGN)
    query = _load_mixed(
        q, out, logit_gain, rows, head, H, W, q_y, q_x, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE
    )
    factor = tl.maximum(scale * LOG2_E, SMALLEST)  # -inf times this stays -inf
    acc = tl.zeros([BLOCK_M, CHANNELS], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    k_tile = _tile(H, W, k_y, k_x, BLOCK_N, DP, LEVEL, ALIGN, WIDE)
    v_tile = _tile(H, W, v_y, v_x, BLOCK_N, DP, LEVEL, ALIGN, WIDE)
    y, x = _first()
    for start in tl.range(0, tokens, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key = _stream(
            k, k_tile, columns, y, x, H, W, k_y, k_x, D, DP, LEVEL, ALIGN, WIDE, WHOLE
        )
        s = _dot(query, tl.trans(key), None, PRECISION)
        if not WHOLE:
            s = tl.where((columns < tokens)[None, :], s, float("-inf"))
        above = tl.maximum(highest, tl.max(s, 1) * factor)  # which is positive
        p = tl.exp2(s * factor - above[:, None])
        decay = tl.exp2(highest - above)
        total = total * decay + tl.sum(p, 1)
        highest = above
        value = _stream(
            v, v_tile, columns, y, x, H, W, v_y, v_x, D, DP, LEVEL, ALIGN, WIDE, WHOLE
        )
        acc = _dot(p.to(value.dtype), value, acc * decay[:, None], PRECISION)
        if WHOLE:
            y, x = _next(y, x, W >> LEVEL, BLOCK_N)

    tiles = _split(acc / total[:, None], BLOCK_M, 4**LEVEL, DP)
    if mixed is not None:
        mixed = _image(mixed, n, head, o_n, o_h, ALIGN)
        _store_positions(mixed, tiles, rows, H, W, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE)
    if lse is not None:
        at = image.to(tl.int64) * tokens + rows
        tl.store(lse + at, highest + tl.log2(total), rows < tokens)
    tiles = _mix(tiles, value_gain, head, LEVEL)
    _store_positions(out, tiles, rows, H, W, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE)


@triton.jit
def _store_sums(
    parts, a, b, first, image, tokens, BLOCK_M: tl.constexpr, LEVEL: tl.constexpr
):
    """For each of the 4^LEVEL tiles a and b: sums of a b over channels and GROUP rows."""
    GROUPS: tl.constexpr = BLOCK_M // GROUP
    group = first // GROUP + tl.arange(0, GROUPS)
    groups = tl.cdiv(tokens, GROUP)
    at = (image.to(tl.int64) * groups + group) * 4**LEVEL
    for i in tl.static_range(4**LEVEL):
        sums = tl.sum(tl.reshape(tl.sum(a[i] * b[i], 1), (GROUPS, GROUP)), 1)
        tl.store(parts + at + i, sums, group < groups)


@triton.jit(do_not_specialize=SIZES)
def _backward_queries(
    q, k, v, mixed, grad, dq, lse, delta, logit_gain, value_gain, logit_parts, value_parts,
    scale, heads, H, W, q_n, q_h, q_y, q_x, k_n, k_h, k_y, k_x, v_n, v_h, v_y, v_x,
    o_n, o_h, o_y, o_x, g_n, g_h, g_y, g_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, delta_i = <u_i, M_g do_i> for the other kernel, and the partial sums of the gradients
    of the gains, one for each position in a block."""
    scale = tl.cast(scale, tl.float32)
    tokens = (H >> LEVEL) * (W >> LEVEL)
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = tl.program_id(0) // tiles
    n, head = image // heads, image % heads
    first = (tl.program_id(0) % tiles) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)

    q, k = _image(q, n, head, q_n, q_h, ALIGN), _image(k, n, head, k_n, k_h, ALIGN)
    v, grad = _image(v, n, head, v_n, v_h, ALIGN), _image(grad, n, head, g_n, g_h, ALIGN)
    mixed, dq = _image(mixed, n, head, o_n, o_h, ALIGN), _image(dq, n, head, o_n, o_h, ALIGN)
    u = _load_positions(mixed, rows, H, W, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE)
    do = _load_positions(grad, rows, H, W, g_y, g_x, D, DP, LEVEL, ALIGN, WIDE)
    if value_gain is not None:
        u, do = _transform(u, LEVEL, False), _transform(do, LEVEL, False)
        _store_sums(value_parts, u, do, first, image, tokens, BLOCK_M, LEVEL)
        do = _weigh(do, value_gain, head, LEVEL)
    products = u[0] * do[0]
    for i in tl.static_range(1, 4**LEVEL):
        products += u[i] * do[i]
    d_rows = tl.sum(products, 1)
    at = image.to(tl.int64) * tokens + rows
    tl.store(delta + at, d_rows, rows < tokens)
    log_sum = tl.load(lse + at, rows < tokens, 0.0)

    query = _load_mixed(
        q, dq, logit_gain, rows, head, H, W, q_y, q_x, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE
    )
    d_out = _load_mixed(
        grad, dq, value_gain, rows, head, H, W, g_y, g_x, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE
    )
    acc = tl.zeros([BLOCK_M, DP << (2 * LEVEL)], tl.float32)
    k_tile = _tile(H, W, k_y, k_x, BLOCK_N, DP, LEVEL, ALIGN, WIDE)
    v_tile = _tile(H, W, v_y, v_x, BLOCK_N, DP, LEVEL, ALIGN, WIDE)
    y, x = _first()
    for start in tl.range(0, tokens, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key = _stream(
            k, k_tile, columns, y, x, H, W, k_y, k_x, D, DP, LEVEL, ALIGN, WIDE, WHOLE
        )
        value = _stream(
            v, v_tile, columns, y, x, H, W, v_y, v_x, D, DP, LEVEL, ALIGN, WIDE, WHOLE
        )
        s = _dot(query, tl.trans(key), None, PRECISION)
        dp = _dot(d_out, tl.trans(value), None, PRECISION)
        p = tl.exp2(s * (scale * LOG2_E) - log_sum[:, None])
        if not WHOLE:
            p = tl.where((columns < tokens)[None, :], p, 0.0)
        ds = p * (dp - d_rows[:, None])
        acc = _dot(ds.to(key.dtype), key, acc, PRECISION)
        if WHOLE:
            y, x = _next(y, x, W >> LEVEL, BLOCK_N)

    tiles = _split(acc * scale, BLOCK_M, 4**LEVEL, DP)
    if logit_gain is not None:
        pixels = _load_positions(q, rows, H, W, q_y, q_x, D, DP, LEVEL, ALIGN, WIDE)
        tiles = _transform(tiles, LEVEL, False)
        bands = _transform(pixels, LEVEL, False)
        _store_sums(logit_parts, tiles, bands, first, image, tokens, BLOCK_M, LEVEL)
        tiles = _transform(_weigh(tiles, logit_gain, head, LEVEL), LEVEL, True)
    _store_positions(dq, tiles, rows, H, W, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE)


@triton.jit(do_not_specialize=SIZES)
def _backward_keys(
    q, k, v, grad, dk, dv, lse, delta, logit_gain, value_gain,
    scale, heads, H, W, q_n, q_h, q_y, q_x, k_n, k_h, k_y, k_x, v_n, v_h, v_y, v_x,
    o_n, o_h, o_y, o_x, g_n, g_h, g_y, g_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, over all queries, BLOCK_M at a time."""
    scale = tl.cast(scale, tl.float32)
    CHANNELS: tl.constexpr = DP << (2 * LEVEL)
    tokens = (H >> LEVEL) * (W >> LEVEL)
    tiles = tl.cdiv(tokens, BLOCK_N)
    image = tl.program_id(0) // tiles
    n, head = image // heads, image % heads
    columns = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)

    q, grad = _image(q, n, head, q_n, q_h, ALIGN), _image(grad, n, head, g_n, g_h, ALIGN)
    k, dk = _image(k, n, head, k_n, k_h, ALIGN), _image(dk, n, head, o_n, o_h, ALIGN)
    v, dv = _image(v, n, head, v_n, v_h, ALIGN), _image(dv, n, head, o_n, o_h, ALIGN)
    key = _load_mixed(
        k, dk, logit_gain, columns, head, H, W, k_y, k_x, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE
    )
    value = _load_mixed(
        v, dv, value_gain, columns, head, H, W, v_y, v_x, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE
    )
    d_key = tl.zeros([BLOCK_N, CHANNELS], tl.float32)
    d_value = tl.zeros([BLOCK_N, CHANNELS], tl.float32)
    q_tile = _tile(H, W, q_y, q_x, BLOCK_M, DP, LEVEL, ALIGN, WIDE)
    g_tile = _tile(H, W, g_y, g_x, BLOCK_M, DP, LEVEL, ALIGN, WIDE)
    y, x = _first()
    for start in tl.range(0, tokens, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        at = image.to(tl.int64) * tokens + rows
        query = _stream(
            q, q_tile, rows, y, x, H, W, q_y, q_x, D, DP, LEVEL, ALIGN, WIDE, WHOLE
        )
        do = _stream(
            grad, g_tile, rows, y, x, H, W, g_y, g_x, D, DP, LEVEL, ALIGN, WIDE, WHOLE
        )
        if WHOLE:
            log_sum, d_rows = tl.load(lse + at), tl.load(delta + at)
        else:  # beyond the last query: p = 0
            log_sum = tl.load(lse + at, rows < tokens, float("inf"))
            d_rows = tl.load(delta + at, rows < tokens, 0.0)
        s = _dot(key, tl.trans(query), None, PRECISION)
        p = tl.exp2(s * (scale * LOG2_E) - log_sum[None, :])
        d_value = _dot(p.to(do.dtype), do, d_value, PRECISION)
        dp = _dot(value, tl.trans(do), None, PRECISION)
        ds = p * (dp - d_rows[None, :])
        d_key = _dot(ds.to(query.dtype), query, d_key, PRECISION)
        if WHOLE:
            y, x = _next(y, x, W >> LEVEL, BLOCK_M)

    tiles_k = _mix(_split(d_key * scale, BLOCK_N, 4**LEVEL, DP), logit_gain, head, LEVEL)
    _store_positions(dk, tiles_k, columns, H, W, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE)
    tiles_v = _mix(_split(d_value, BLOCK_N, 4**LEVEL, DP), value_gain, head, LEVEL)
    _store_positions(dv, tiles_v, columns, H, W, o_y, o_x, D, DP, LEVEL, ALIGN, WIDE)


# (BLOCK_M, BLOCK_N, num_warps) by channels of a tile, for two-byte dtypes and 227 KiB of shared
# memory. Accumulators take half of the registers: 128 of float32 a thread. What is spilled, is so
# mostly before and after the loop, where the tiles that are transformed stand beside the
# accumulator in float32: of the loops' instructions none to 1 in 30 goes to a spilled register on
# sm_80 and sm_90 (1 in 19 in _backward_keys at 256 channels on sm_90), at most 1 in 16 on sm_100
# (python -m benchmarks compile-report).
TILES = {
    "_forward": {64: (128, 64, 4), 128: (128, 64, 8), 256: (128, 32, 8), 512: (64, 32, 8)},
    "_backward_queries": {64: (64, 64, 4), 128: (128, 64, 8), 256: (128, 32, 8), 512: (64, 16, 8)},
    "_backward_keys": {64: (64, 64, 4), 128: (64, 128, 8), 256: (64, 64, 8), 512: (32, 32, 8)},
}
# Of float32 in a thread's registers, of which there are 255: pointers and what is being converted
# need the others.
LARGEST_NUMBERS = 160


def configurations(
    kernel: str, channels: int, dtype: torch.dtype, capability: int
) -> list[triton.Config]:
    """What to launch a kernel with, the default first. ``channels`` = 4^level DP."""
    if capability == 0:  # the interpreter: small tiles show more borders
        return [triton.Config({"BLOCK_M": 32, "BLOCK_N": 16})]
    m, n, warps = TILES[kernel][max(64, channels)]
    if dtype == torch.float32:
        m, n, warps = min(m, 32), min(n, 32), 8
    # Tiles that stay: q, or q and do, or k and v; tiles that stream past: always two.
    stay = {"_forward": 1, "_backward_queries": 2, "_backward_keys": 2}[kernel]
    keys = kernel == "_backward_keys"

    def bytes_of(m: int, n: int, stages: int) -> int:
        own, streamed = (n, m) if keys else (m, n)
        tiles = (stay * own + 2 * stages * streamed) * channels
        if capability >= 100 and kernel == "_backward_queries":  # tcgen05 reads ds from there too
            tiles += max(m, 128) * max(n, 64)
        return tiles * dtype.itemsize

    if keys and capability >= 100:  # tcgen05 has p and ds in shared memory too
        m = min(m, 8192 // channels)
    if capability < 90 and warps == 8:  # the accumulators of mma take more registers
        m, n = (m, n) if channels < 256 else (64, 32) if not keys else (32, n)
    room = shared_memory(capability) - 2048
    while bytes_of(m, n, 1) > room and max(m, n) > 16:
        m, n = (m // 2, n) if m >= n else (m, n // 2)
    stages = max((s for s in (1, 2, 3) if bytes_of(m, n, s) <= room), default=1)
    if stages == 1 and min(m, n) > 16:
        m, n, stages = (m // 2, n, 2) if keys else (m, n // 2, 2)
    options = [(m, n, stages, warps), (m, n, max(1, stages - 1), warps), (m, n, stages, 12 - warps)]
    if (n if keys else m) > 16:
        options.append((m, n // 2, stages, 4) if keys else (m // 2, n, stages, 4))
    wide = kernel == "_forward" and capability == 90 and dtype.itemsize == 2
    if wide and bytes_of(m, 2 * n, 2) <= room:
        # What the loop does once for all of its keys, the accumulator's decay first, is done for
        # twice as many.
        options.insert(0, (m, 2 * n, 2, warps))

    def numbers(m: int, n: int, warps: int) -> int:
        """Of float32 that a thread keeps in registers: accumulators and logits."""
        accumulators = 2 * n if keys else m
        return (accumulators * max(64, channels) + m * n) // (32 * warps)

    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_stages=s, num_warps=w)
        for m, n, s, w in dict.fromkeys(options)
        if numbers(m, n, w) <= LARGEST_NUMBERS
    ]


def padded(d: int, level: int) -> int:
    """DP: the width of a position in a tile."""
    return max(triton.next_power_of_2(d), 16 >> (2 * level))


def _launch(kernel, block: str, level: int, strided: dict[str, torch.Tensor], *args) -> None:
    """Run ``kernel`` on its ``args``, sizes and strides excepted, a program for each ``block`` of
    tokens. ``strided`` names the tensors whose strides it takes."""
    other = "BLOCK_N" if block == "BLOCK_M" else "BLOCK_M"
    q = strided["q"]
    n, heads, height, width, d = q.shape
    tokens = (height >> level) * (width >> level)
    strides = [x.stride(i) if x.shape[i] > 1 else 0 for x in strided.values() for i in range(4)]
    align = 16 // q.element_size()
    if any(s % align for s in strides):
        align = 1
    spans = [(height - 1) * x.stride(2) + (width - 1) * x.stride(3) for x in strided.values()]
    dp = padded(d, level)
    configs = configurations(kernel.__name__, dp << (2 * level), q.dtype, capability(q.device))
    streamed = [c.kwargs[other] for c in (configs if registration.AUTOTUNE else configs[:1])]
    launch(
        kernel,
        configs,
        lambda meta: (n * heads * cdiv(tokens, meta[block]),),
        *args,
        heads,
        height,
        width,
        *(s // align for s in strides),
        D=d,
        DP=dp,
        LEVEL=level,
        ALIGN=align,
        WIDE=max(*spans, tokens * (width >> level)) >= WIDE_FROM,
        WHOLE=all(are_whole(size, tokens, width >> level) for size in streamed),
        PRECISION="ieee",  # of float32's products, whatever torch.backends says of TF32
    )


def are_whole(size: int, tokens: int, columns: int) -> bool:
    """Do tiles of ``size`` blocks cover all ``tokens``, each whole rows of blocks or a part of one?
    Then a loop over tiles needs no masks, and goes on by a scalar."""
    return tokens % size == 0 and (columns % size == 0 or size % columns == 0)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its channels side by side."""
    return x if x.stride(4) == 1 or x.shape[4] == 1 else x.contiguous()


def _dense(gain: torch.Tensor | None) -> torch.Tensor | None:
    return None if gain is None else gain.contiguous()


def _like(q: torch.Tensor) -> torch.Tensor:
    """A dense tensor, its axes in memory in the order of those of ``q``."""
    order = sorted(range(4), key=q.stride, reverse=True)
    shape = [q.shape[i] for i in order]
    back = [order.index(i) for i in range(4)]
    return q.new_empty((*shape, q.shape[4])).permute(*back, 4)


def _fake(q, k, v, logit_gain, value_gain, level, scale, save):
    n, heads, height, width, _ = q.shape
    mixed = _like(q) if save and value_gain is not None else q.new_empty(0)
    size = n * heads * (height >> level) * (width >> level) if save else 0
    return _like(q), mixed, q.new_empty(size, dtype=torch.float32)


@operator(_fake)
def wavelet_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logit_gain: torch.Tensor | None,
    value_gain: torch.Tensor | None,
    level: int,
    scale: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, u, lse): u and the log-sum-exp (base 2) only if ``save``, u only with a value gain.
    ``scale`` is not negative."""
    out, mixed, lse = _fake(q, k, v, logit_gain, value_gain, level, scale, save)
    if q.numel():
        q, k, v = (_readable(x) for x in (q, k, v))
        logit_gain, value_gain = map(_dense, (logit_gain, value_gain))
        u = mixed if mixed.numel() else None
        _launch(
            _forward, "BLOCK_M", level, {"q": q, "k": k, "v": v, "o": out},
            q, k, v, out, u, lse if save else None, logit_gain, value_gain, scale,
        )  # fmt: skip
    return out, mixed, lse


def _fake_backward(grad, q, k, v, mixed, lse, logit_gain, value_gain, level, scale):
    gains = (q.new_empty(0) if g is None else torch.empty_like(g) for g in (logit_gain, value_gain))
    return _like(q), _like(q), _like(q), *gains


@operator(_fake_backward)
def wavelet_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mixed: torch.Tensor,
    lse: torch.Tensor,
    logit_gain: torch.Tensor | None,
    value_gain: torch.Tensor | None,
    level: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and the gains, empty for a gain that is None. ``mixed`` is u."""
    dq, dk, dv = (_like(q) for _ in range(3))
    parts: list[torch.Tensor | None] = [None, None]
    if q.numel():
        grad, q, k, v = (_readable(x) for x in (grad, q, k, v))
        dense = [*map(_dense, (logit_gain, value_gain))]
        delta = torch.empty_like(lse)
        strided = {"q": q, "k": k, "v": v, "o": dq, "g": grad}
        n, heads, height, width, _ = q.shape
        groups = cdiv((height >> level) * (width >> level), GROUP.value)
        parts = [
            None if g is None else lse.new_empty(n, heads, groups, 4**level)
            for g in (logit_gain, value_gain)
        ]
        _launch(
            _backward_queries, "BLOCK_M", level, strided,
            q, k, v, mixed, grad, dq, lse, delta, *dense, *parts, scale,
        )  # fmt: skip
        _launch(
            _backward_keys, "BLOCK_N", level, strided,
            q, k, v, grad, dk, dv, lse, delta, *dense, scale,
        )  # fmt: skip
    gains = (_by_band(p, g, level, q) for p, g in zip(parts, (logit_gain, value_gain), strict=True))
    return dq, dk, dv, *gains


def _by_band(parts, gain, level, q):
    """Sum (N,heads,groups,4^level) over all but heads and over the positions of a band."""
    if gain is None:
        return q.new_empty(0)
    if parts is None:
        return torch.zeros_like(gain)
    sums = parts.sum((0, 2)).view(-1, *[2] * (2 * level))
    if level == 1:
        bands = sums.mT.flatten(1)
    else:
        coarse, fine = sums[:, :, 0, :, 0], sums.sum((1, 3))
        bands = torch.cat([coarse.mT.flatten(1), fine.mT.flatten(1)[:, 1:]], 1)
    return bands.to(gain.dtype)


def _setup_context(ctx, inputs, output):
    q, k, v, logit_gain, value_gain, ctx.level, ctx.scale, _ = inputs
    out, mixed, lse = output
    ctx.mark_non_differentiable(mixed, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        q, k, v, out if value_gain is None else mixed, lse, logit_gain, value_gain
    )


def _backward(ctx, grad, *_):
    checks.differentiated_once("wavelet_attention")
    q, k, v, mixed, lse, *gains = ctx.saved_tensors
    grads = wavelet_attention_backward(grad, q, k, v, mixed, lse, *gains, ctx.level, ctx.scale)
    grads = [None if x is None else g for x, g in zip((q, k, v, *gains), grads, strict=True)]
    return *grads, None, None, None


wavelet_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def wavelet_attention(q, k, v, logit_gain=None, value_gain=None, level=1, scale=None):
    """See ``diffad_fast.ops.wavelet_attention``."""
    if scale is None:
        scale = (4**level * q.shape[4]) ** -0.5
    elif scale < 0:
        q, scale = -q, -scale
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, logit_gain, value_gain)
    )
    return wavelet_attention_forward(q, k, v, logit_gain, value_gain, level, float(scale), save)[0]


def _variant(kernel, d: int, level: int, dtype: torch.dtype, gains=True, whole=True, keeps=True):
    """A kernel as :func:`_launch` would have it compiled, for COMPILE: of a training step or, where
    nothing is kept for one, of inference."""
    of_dtype = ("q", "k", "v", "out", "mixed", "grad", "dq", "dk", "dv")
    of_gains = ("logit_gain", "value_gain", "logit_parts", "value_parts")
    types = dict.fromkeys(SIZES, "i32") | {"scale": "fp32"}
    types |= dict.fromkeys(of_dtype, f"*{DTYPES[dtype]}") | dict.fromkeys(("lse", "delta"), "*fp32")
    constants = {"D": d, "DP": padded(d, level), "LEVEL": level, "ALIGN": 16 // dtype.itemsize}
    constants |= {"WIDE": False, "WHOLE": whole, "PRECISION": "ieee"}
    if gains:
        types |= dict.fromkeys(of_gains, "*fp32")
    else:
        constants |= dict.fromkeys(of_gains)
        if kernel is _forward:
            constants["mixed"] = None
    if not keeps:
        constants |= {"mixed": None, "lse": None}
    names = set(kernel.arg_names)
    types = {k: t for k, t in types.items() if k in names - set(constants)}
    constants = {k: c for k, c in constants.items() if k in names}

    def make(capability: int, config: triton.Config | None = None):
        if config is None:
            channels = padded(d, level) << (2 * level)
            config = configurations(kernel.__name__, channels, dtype, capability)[0]
        return source(kernel, config, types, **constants)

    return make


COMPILE = {
    f"{kernel.__name__[1:]}, level {level}, d {d}, {DTYPES[dtype]}{note}": _variant(
        kernel, d, level, dtype, "no gains" not in note, "cut tiles" not in note,
        "inference" not in note,
    )
    for level, d, dtype, note in (
        (1, 64, torch.bfloat16, ""),
        (1, 64, torch.bfloat16, ", no gains"),
        (1, 64, torch.bfloat16, ", cut tiles"),
        (1, 64, torch.bfloat16, ", inference"),
        (1, 64, torch.float16, ""),
        (1, 32, torch.bfloat16, ""),
        (2, 32, torch.bfloat16, ""),
        (1, 32, torch.float32, ""),
    )
    for kernel in (_forward, _backward_queries, _backward_keys)
    if kernel is _forward or (note != ", inference" and dtype != torch.float16)
}
