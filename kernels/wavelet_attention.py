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
at p DP + c, DP being d up to a power of two, at least 16 / P. Tensors are read and written in
their own strides; only channels must lie side by side.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .registration import DTYPES, capability, launch, operator, shared_memory, source

LOG2_E = tl.constexpr(math.log2(math.e))
# No kernel is compiled again for another size. Strides, of images, heads, rows and columns of the
# five tensors that a kernel may have, in units of ALIGN elements.
STRIDES = [f"{x}_{axis}" for x in "qkvog" for axis in "nhyx"]
SIZES = ["heads", "H", "W", *STRIDES]
GROUP = tl.constexpr(16)  # queries of one partial sum; every BLOCK_M is a multiple


@triton.jit
def _butterfly(x, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Sum and difference of neighbours along the middle axis of x as (ROWS, OUTER, 2, INNER)."""
    x = tl.permute(tl.reshape(x, (ROWS, OUTER, 2, INNER)), (0, 1, 3, 2))
    a, b = tl.split(x)
    x = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
    return tl.reshape(x, (ROWS, 2 * OUTER * INNER))


@triton.jit
def _haar(x, ROWS: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, INVERSE: tl.constexpr):
    """T x for each row of x (ROWS, 4^LEVEL DP), or T^T x.

    The coefficient that is high in y (x) takes the place of the odd row (column). Level 2: rows
    are 2 y1 + y0, columns 2 x1 + x0; its first stage acts on y0 and x0, its second on y1 and x1
    where y0 = x0 = 0. Each stage is symmetric, so the inverse has them in the other order.
    """
    if LEVEL == 1:
        x = _butterfly(_butterfly(x, ROWS, 2, DP), ROWS, 1, 2 * DP) * 0.5
    else:
        for stage in tl.static_range(2):
            if (stage == 0) != INVERSE:
                x = _butterfly(_butterfly(x, ROWS, 8, DP), ROWS, 2, 4 * DP) * 0.5
            else:
                low = _butterfly(_butterfly(x, ROWS, 4, 2 * DP), ROWS, 1, 8 * DP) * 0.5
                position = tl.arange(0, 16 * DP) // DP
                x = tl.where(((position & 5) == 0)[None, :], low, x)
    return x


@triton.jit
def _gains(gain, head, DP: tl.constexpr, LEVEL: tl.constexpr):
    """(4^LEVEL DP,): the gain of each coefficient, in the order of :func:`_haar`."""
    position = tl.arange(0, DP << (2 * LEVEL)) // DP
    if LEVEL == 1:
        band = (position >> 1) + 2 * (position & 1)
    else:
        fine = ((position >> 2) & 1) + 2 * (position & 1)
        band = tl.where(fine > 0, 3 + fine, (position >> 3) + (position & 2))
    return tl.load(gain + head * (1 + 3 * LEVEL) + band).to(tl.float32)


@triton.jit
def _mix(x, gain, head, ROWS: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr):
    """T^T diag(gain) T x for each row of x; x itself where there is no gain."""
    if gain is not None:
        g = _gains(gain, head, DP, LEVEL)
        x = _haar(_haar(x, ROWS, DP, LEVEL, False) * g[None, :], ROWS, DP, LEVEL, True)
    return x


@triton.jit
def _tile(
    tokens, n, head, H, W, stride_n, stride_h, stride_y, stride_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of the tile of blocks ``tokens``. Strides are in units of ALIGN elements,
    so that the compiler knows how wide it may read."""
    columns = W >> LEVEL
    # tokens // columns by a product: exact while tokens * columns < 2^40.
    reciprocal = ((1 << 40) + columns.to(tl.int64) - 1) // columns
    row = ((tokens.to(tl.int64) * reciprocal) >> 40).to(tl.int32)
    column = tokens - row * columns
    e = tl.arange(0, DP << (2 * LEVEL))
    y, x, c = e // (DP << LEVEL), (e // DP) & ((1 << LEVEL) - 1), e % DP
    first = n.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h
    stride_y, stride_x = stride_y.to(tl.int64), stride_x.to(tl.int64)
    block = first + (row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x) * (1 << LEVEL)
    inside = y * stride_y + x * stride_x
    offsets = (block * ALIGN)[:, None] + (inside * ALIGN + c)[None, :]
    mask = (tokens < (H >> LEVEL) * columns)[:, None] & (c < D)[None, :]
    return offsets, mask


@triton.jit
def _load(
    x, tokens, n, head, H, W, stride_n, stride_h, stride_y, stride_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    offsets, mask = _tile(
        tokens, n, head, H, W, stride_n, stride_h, stride_y, stride_x, D, DP, LEVEL, ALIGN
    )
    return tl.load(x + offsets, mask, 0.0)


@triton.jit
def _store(
    x, tile, tokens, n, head, H, W, stride_n, stride_h, stride_y, stride_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    offsets, mask = _tile(
        tokens, n, head, H, W, stride_n, stride_h, stride_y, stride_x, D, DP, LEVEL, ALIGN
    )
    tl.store(x + offsets, tile.to(x.dtype.element_ty), mask)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    q, k, v, out, mixed, lse, logit_gain, value_gain, scale, heads, H, W,
    q_n, q_h, q_y, q_x, k_n, k_h, k_y, k_x, v_n, v_h, v_y, v_x, o_n, o_h, o_y, o_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = DP << (2 * LEVEL)
    tokens = (H >> LEVEL) * (W >> LEVEL)
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = tl.program_id(0) // tiles
    n, head = image // heads, image % heads
    rows = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)

    query = _load(q, rows, n, head, H, W, q_n, q_h, q_y, q_x, D, DP, LEVEL, ALIGN)
    if logit_gain is not None:
        # Through memory and back, at a place that is this program's to write: only a tile that was
        # loaded is given to wgmma from shared memory, any other stays in registers, too many.
        query = _mix(query.to(tl.float32), logit_gain, head, BLOCK_M, DP, LEVEL)
        _store(out, query, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
        tl.debug_barrier()
        query = _load(out, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)

    acc = tl.zeros([BLOCK_M, CHANNELS], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in tl.range(0, tokens, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key = _load(k, columns, n, head, H, W, k_n, k_h, k_y, k_x, D, DP, LEVEL, ALIGN)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        s = tl.where((columns < tokens)[None, :], s * (scale * LOG2_E), float("-inf"))
        above = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - above[:, None])
        decay = tl.exp2(highest - above)
        total = total * decay + tl.sum(p, 1)
        highest = above
        value = _load(v, columns, n, head, H, W, v_n, v_h, v_y, v_x, D, DP, LEVEL, ALIGN)
        acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)

    acc = acc / total[:, None]
    if mixed is not None:
        _store(mixed, acc, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
    if lse is not None:
        at = image.to(tl.int64) * tokens + rows
        tl.store(lse + at, highest + tl.log2(total), rows < tokens)
    acc = _mix(acc, value_gain, head, BLOCK_M, DP, LEVEL)
    _store(out, acc, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)


@triton.jit
def _store_sums(
    parts, products, rows, image, tokens,
    BLOCK_M: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """Sums of products (BLOCK_M, CHANNELS) over GROUP rows and the channels of a position."""
    POSITIONS: tl.constexpr = 1 << (2 * LEVEL)
    GROUPS: tl.constexpr = BLOCK_M // GROUP
    sums = tl.sum(tl.reshape(products, (GROUPS, GROUP, POSITIONS * DP)), 1)
    sums = tl.sum(tl.reshape(sums, (GROUPS, POSITIONS, DP)), 2)
    group = tl.min(rows) // GROUP + tl.arange(0, GROUPS)
    groups = tl.cdiv(tokens, GROUP)
    at = (image.to(tl.int64) * groups + group)[:, None] * POSITIONS + tl.arange(0, POSITIONS)
    tl.store(parts + at, sums, (group < groups)[:, None])


@triton.jit(do_not_specialize=SIZES)
def _backward_queries(
    q, k, v, mixed, grad, dq, lse, delta, logit_gain, value_gain, logit_parts, value_parts,
    scale, heads, H, W, q_n, q_h, q_y, q_x, k_n, k_h, k_y, k_x, v_n, v_h, v_y, v_x,
    o_n, o_h, o_y, o_x, g_n, g_h, g_y, g_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, delta = <u_i, M_g do_i> for the other kernel, and this program's part of the gains'
    gradients, one number for each position in a block."""
    POSITIONS: tl.constexpr = 1 << (2 * LEVEL)
    tokens = (H >> LEVEL) * (W >> LEVEL)
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = tl.program_id(0) // tiles
    n, head = image // heads, image % heads
    rows = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    # dq serves as the scratch of the forward kernel's note, for M_w q and then M_g do.
    query = _load(q, rows, n, head, H, W, q_n, q_h, q_y, q_x, D, DP, LEVEL, ALIGN)
    if logit_gain is not None:
        query = _mix(query.to(tl.float32), logit_gain, head, BLOCK_M, DP, LEVEL)
        _store(dq, query, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
        tl.debug_barrier()
        query = _load(dq, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
        tl.debug_barrier()
    do = _load(grad, rows, n, head, H, W, g_n, g_h, g_y, g_x, D, DP, LEVEL, ALIGN)
    u = _load(mixed, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
    if value_gain is not None:
        d_bands = _haar(do.to(tl.float32), BLOCK_M, DP, LEVEL, False)
        products = _haar(u.to(tl.float32), BLOCK_M, DP, LEVEL, False) * d_bands
        gain = _gains(value_gain, head, DP, LEVEL)[None, :]
        _store_sums(value_parts, products, rows, image, tokens, BLOCK_M, DP, LEVEL)
        d_rows = tl.sum(products * gain, 1)
        d_mixed = _haar(d_bands * gain, BLOCK_M, DP, LEVEL, True)
        _store(dq, d_mixed, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
        tl.debug_barrier()
        do = _load(dq, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
    else:
        d_rows = tl.sum(u.to(tl.float32) * do.to(tl.float32), 1)
    at = image.to(tl.int64) * tokens + rows
    tl.store(delta + at, d_rows, rows < tokens)
    log_sum = tl.load(lse + at, rows < tokens, 0.0)

    acc = tl.zeros([BLOCK_M, POSITIONS * DP], tl.float32)
    for start in tl.range(0, tokens, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key = _load(k, columns, n, head, H, W, k_n, k_h, k_y, k_x, D, DP, LEVEL, ALIGN)
        value = _load(v, columns, n, head, H, W, v_n, v_h, v_y, v_x, D, DP, LEVEL, ALIGN)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        p = tl.exp2(s * (scale * LOG2_E) - log_sum[:, None])
        p = tl.where((columns < tokens)[None, :], p, 0.0)
        ds = p * (dp - d_rows[:, None])
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision=PRECISION)

    acc = acc * scale
    if logit_gain is not None:
        d_bands = _haar(acc, BLOCK_M, DP, LEVEL, False)
        query = _load(q, rows, n, head, H, W, q_n, q_h, q_y, q_x, D, DP, LEVEL, ALIGN)
        products = _haar(query.to(tl.float32), BLOCK_M, DP, LEVEL, False) * d_bands
        _store_sums(logit_parts, products, rows, image, tokens, BLOCK_M, DP, LEVEL)
        gain = _gains(logit_gain, head, DP, LEVEL)[None, :]
        acc = _haar(d_bands * gain, BLOCK_M, DP, LEVEL, True)
    _store(dq, acc, rows, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)


@triton.jit(do_not_specialize=SIZES)
def _backward_keys(
    q, k, v, grad, dk, dv, lse, delta, logit_gain, value_gain,
    scale, heads, H, W, q_n, q_h, q_y, q_x, k_n, k_h, k_y, k_x, v_n, v_h, v_y, v_x,
    o_n, o_h, o_y, o_x, g_n, g_h, g_y, g_x,
    D: tl.constexpr, DP: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, over all queries, BLOCK_M at a time."""
    CHANNELS: tl.constexpr = DP << (2 * LEVEL)
    tokens = (H >> LEVEL) * (W >> LEVEL)
    tiles = tl.cdiv(tokens, BLOCK_N)
    image = tl.program_id(0) // tiles
    n, head = image // heads, image % heads
    columns = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)

    # dk and dv serve as the scratch of the forward kernel's note, for M_w k and M_g v.
    key = _load(k, columns, n, head, H, W, k_n, k_h, k_y, k_x, D, DP, LEVEL, ALIGN)
    if logit_gain is not None:
        key = _mix(key.to(tl.float32), logit_gain, head, BLOCK_N, DP, LEVEL)
        _store(dk, key, columns, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
        tl.debug_barrier()
        key = _load(dk, columns, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
    value = _load(v, columns, n, head, H, W, v_n, v_h, v_y, v_x, D, DP, LEVEL, ALIGN)
    if value_gain is not None:
        value = _mix(value.to(tl.float32), value_gain, head, BLOCK_N, DP, LEVEL)
        _store(dv, value, columns, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
        tl.debug_barrier()
        value = _load(dv, columns, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)

    d_key = tl.zeros([BLOCK_N, CHANNELS], tl.float32)
    d_value = tl.zeros([BLOCK_N, CHANNELS], tl.float32)
    for start in tl.range(0, tokens, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        at = image.to(tl.int64) * tokens + rows
        query = _load(q, rows, n, head, H, W, q_n, q_h, q_y, q_x, D, DP, LEVEL, ALIGN)
        do = _load(grad, rows, n, head, H, W, g_n, g_h, g_y, g_x, D, DP, LEVEL, ALIGN)
        # Beyond the last query: p = 0.
        log_sum = tl.load(lse + at, rows < tokens, float("inf"))
        d_rows = tl.load(delta + at, rows < tokens, 0.0)
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        p = tl.exp2(s * (scale * LOG2_E) - log_sum[None, :])
        d_value = tl.dot(p.to(do.dtype), do, d_value, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - d_rows[None, :])
        d_key = tl.dot(ds.to(query.dtype), query, d_key, input_precision=PRECISION)

    d_key = _mix(d_key * scale, logit_gain, head, BLOCK_N, DP, LEVEL)
    _store(dk, d_key, columns, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)
    d_value = _mix(d_value, value_gain, head, BLOCK_N, DP, LEVEL)
    _store(dv, d_value, columns, n, head, H, W, o_n, o_h, o_y, o_x, D, DP, LEVEL, ALIGN)


def configurations(kernel: str, channels: int, dtype: torch.dtype, capability: int):
    """What to launch a kernel with, the default first. ``channels`` = 4^level DP."""
    return [triton.Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=2)]


def padded(d: int, level: int) -> int:
    """DP: the width of a position in a tile."""
    return max(triton.next_power_of_2(d), 16 >> (2 * level))


def _launch(kernel, block: str, level: int, strided: dict[str, torch.Tensor], *args) -> None:
    """Run ``kernel`` on its ``args``, sizes and strides excepted, a program for each ``block`` of
    tokens. ``strided`` names the tensors whose strides it takes."""
    q = strided["q"]
    n, heads, height, width, d = q.shape
    tokens = (height >> level) * (width >> level)
    strides = [x.stride(i) if x.shape[i] > 1 else 0 for x in strided.values() for i in range(4)]
    align = 16 // q.element_size()
    if any(s % align for s in strides):
        align = 1
    dp = padded(d, level)
    launch(
        kernel,
        configurations(kernel.__name__, dp << (2 * level), q.dtype, capability(q.device)),
        lambda meta: (n * heads * triton.cdiv(tokens, meta[block]),),
        *args,
        heads,
        height,
        width,
        *(s // align for s in strides),
        D=d,
        DP=dp,
        LEVEL=level,
        ALIGN=align,
        PRECISION="ieee",
    )


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its channels side by side."""
    return x if x.stride(4) == 1 or x.shape[4] == 1 else x.contiguous()


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
    """(out, u, lse): u and the log-sum-exp (base 2) only if ``save``, u only with a value gain."""
    out, mixed, lse = _fake(q, k, v, logit_gain, value_gain, level, scale, save)
    if q.numel():
        q, k, v = (_readable(x) for x in (q, k, v))
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
        delta = torch.empty_like(lse)
        strided = {"q": q, "k": k, "v": v, "o": dq, "g": grad}
        n, heads, height, width, _ = q.shape
        groups = triton.cdiv((height >> level) * (width >> level), GROUP.value)
        parts = [
            None if g is None else lse.new_empty(n, heads, groups, 4**level)
            for g in (logit_gain, value_gain)
        ]
        _launch(
            _backward_queries, "BLOCK_M", level, strided,
            q, k, v, mixed, grad, dq, lse, delta, logit_gain, value_gain, *parts, scale,
        )  # fmt: skip
        _launch(
            _backward_keys, "BLOCK_N", level, strided,
            q, k, v, grad, dk, dv, lse, delta, logit_gain, value_gain, scale,
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
    q, k, v, mixed, lse, *gains = ctx.saved_tensors
    grads = wavelet_attention_backward(grad, q, k, v, mixed, lse, *gains, ctx.level, ctx.scale)
    grads = [None if x is None else g for x, g in zip((q, k, v, *gains), grads, strict=True)]
    return *grads, None, None, None


wavelet_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def wavelet_attention(q, k, v, logit_gain=None, value_gain=None, level=1, scale=None):
    """See ``diffad_fast.ops.wavelet_attention``."""
    if scale is None:
        scale = (4**level * q.shape[4]) ** -0.5
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, logit_gain, value_gain)
    )
    return wavelet_attention_forward(q, k, v, logit_gain, value_gain, level, float(scale), save)[0]


def _variant(kernel, d: int, level: int, dtype: torch.dtype, gains: bool):
    """A kernel as :func:`_launch` would have it compiled, for COMPILE."""

    def make(capability: int, config: triton.Config | None = None):
        name = DTYPES[dtype]
        dp = padded(d, level)
        if config is None:
            config = configurations(kernel.__name__, dp << (2 * level), dtype, capability)[0]
        types = dict.fromkeys(SIZES, "i32") | {"scale": "fp32"}
        types |= dict.fromkeys(("q", "k", "v", "out", "mixed", "grad", "dq", "dk", "dv"), f"*{name}")
        types |= dict.fromkeys(("lse", "delta", "logit_parts", "value_parts"), "*fp32")
        optional = dict.fromkeys(("logit_gain", "value_gain"), "*fp32")
        if kernel is _forward and not gains:
            types["mixed"] = "constexpr"
        types |= optional
        constants = {}
        if not gains:
            without = ("logit_gain", "value_gain", "logit_parts", "value_parts")
            constants = dict.fromkeys((*without, *(("mixed",) if kernel is _forward else ())))
        types = {k: t for k, t in types.items() if k in kernel.arg_names and k not in constants}
        constants = {k: None for k in constants if k in kernel.arg_names}
        align = 16 // dtype.itemsize
        return source(
            kernel, config, types, D=d, DP=dp, LEVEL=level, ALIGN=align, PRECISION="ieee",
            **constants,
        )  # fmt: skip

    return make


COMPILE = {
    f"{kernel.__name__[1:]}, level {level}, d {d}, {DTYPES[dtype]}{'' if gains else ', no gains'}": (
        _variant(kernel, d, level, dtype, gains)
    )
    for level, d, dtype, gains in (
        (1, 64, torch.bfloat16, True),
        (1, 64, torch.bfloat16, False),
        (1, 32, torch.bfloat16, True),
        (2, 32, torch.bfloat16, True),
        (1, 32, torch.float32, True),
    )
    for kernel in (_forward, _backward_queries, _backward_keys)
}
