"""Group normalisation, modulation and SiLU, forward and backward, for dense NCHW and NHWC.

With x normalised to h = (x - mean) / sqrt(variance + eps) over a group of C/G channels of an image,
and the affine maps merged, ::

    u = a h + b,    a = (1 + scale) weight,    b = (1 + scale) bias + shift    (one a channel)
    y = u sigmoid(u)

A group that fits one program's registers is *resident*: read once, reduced there, written once.
A program a group is too few for larger images at small batch. There the pixels of an image are
split into up to SPLITS chunks, a program a chunk and (in NHWC) all groups of it, so that whole rows
of channels are read. Each leaves mean and squared deviations (M2) of each group in a workspace,
accumulated by Welford's recurrence. A second kernel normalises: each of its programs merges the
chunks' results by Chan's formula, in one fixed order, since a third launch for this would cost more
than the few KiB of reads. No program adds to another's result: runs are bit-identical.

The gradient. With v = dy silu'(u), all sums over the group's M values, ::

    dx = (v a - mean(v a) - h mean(v a h)) / sqrt(variance + eps)

and everything else follows from two sums a channel over an image's pixels, S0 = sum v and
S1 = sum v h: mean(v a) = sum_c a S0 / M, mean(v a h) = sum_c a S1 / M, ::

    dscale = weight S1 + bias S0,    dshift = S0,
    dweight = sum_n (1 + scale) S1,  dbias = sum_n (1 + scale) S0.

Sources: Wu & He 2018; Welford 1962; Chan, Golub, LeVeque 1983.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import checks
from ..ops.layout import empty_4d, is_channels_last
from .registration import cdiv, dense, launch, operator, source, wide, widened

# Chunks of pixels an image; a constant of the kernels, which merge this many at once.
SPLITS = 64
# Values that one program holds -> warps. The smallest that a group fits in is taken, so that four
# variants serve every H and W.
RESIDENT = {2048: 4, 8192: 8, 16384: 16}
# Values of a tile of the split kernels.
TILE = 4096


@triton.jit
def _tile(start, stop, first_group, pixels, CHANNELS_LAST: tl.constexpr,
          NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
          BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr):  # fmt: skip
    """BLOCK_P pixels from ``start`` on, before ``stop``, BLOCK_G groups, BLOCK_J channels of each:
    the channels (G,J), which of them exist, and offsets within the image and mask (P,G,J)."""
    p = tl.arange(0, BLOCK_P)[:, None, None]
    g = first_group + tl.arange(0, BLOCK_G)[:, None]
    j = tl.arange(0, BLOCK_J)[None, :]
    channel = g * GROUP_SIZE + j
    exists = (g < NUM_GROUPS) & (j < GROUP_SIZE)
    mask = (p < tl.minimum(stop - start, BLOCK_P).to(tl.int32)) & exists[None, :, :]
    # Only what lies within a tile is counted in 32 bits.
    if CHANNELS_LAST:
        base = start * (NUM_GROUPS * GROUP_SIZE)
        offset = p * (NUM_GROUPS * GROUP_SIZE) + channel[None, :, :]
    else:
        base = start
        offset = channel[None, :, :] * pixels + p
    return channel, exists, base, offset, mask


@triton.jit
def _affine(weight, bias, scale, shift, scale_n, shift_n, n, like, channel, exists,
            WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
            SHIFT: tl.constexpr):  # fmt: skip
    """a and b of u = a h + b (G,J), in the dtype of ``like``; zero where there is no channel.

    A row of ``scale`` (``shift``) is ``scale_n`` (``shift_n``) elements behind the one before it.
    """
    a = exists.to(like.dtype)
    b = tl.zeros_like(a)
    if WEIGHT:
        a = tl.load(weight + channel, exists, 0.0).to(like.dtype)
    if BIAS:
        b = tl.load(bias + channel, exists, 0.0).to(like.dtype)
    if SCALE:
        factor = 1.0 + tl.load(scale + n * scale_n + channel, exists, 0.0).to(like.dtype)
        a *= factor
        b *= factor
    if SHIFT:
        b += tl.load(shift + n * shift_n + channel, exists, 0.0).to(like.dtype)
    return a, b


@triton.jit
def _program(parts, NUM_GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Image, part of it and first group of this program; neighbours share rows of channels."""
    program = tl.program_id(0)
    blocks: tl.constexpr = (NUM_GROUPS + BLOCK_G - 1) // BLOCK_G
    image = program // blocks
    n, part = image // parts, image % parts
    return n.to(tl.int64), part.to(tl.int64), program % blocks * BLOCK_G


@triton.jit
def _sum(value):
    """(P,G,J) -> (G,)"""
    return tl.sum(tl.sum(value, 2), 0)


@triton.jit
def _workspace(n, group, NUM_GROUPS: tl.constexpr, SPLITS: tl.constexpr):
    """Offsets of the first of two results of split 0 in a workspace (N, 2, groups, SPLITS); the
    second is NUM_GROUPS * SPLITS behind it."""
    return (n * 2 * NUM_GROUPS + group) * SPLITS


@triton.jit
def _moments(x, partial, pixels: tl.int64, chunk: tl.int64,
             CHANNELS_LAST: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
             BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr,
             SPLITS: tl.constexpr):  # fmt: skip
    """Mean and M2 of each of BLOCK_G groups over a chunk of pixels."""
    pixels, chunk = tl.cast(pixels, tl.int64), tl.cast(chunk, tl.int64)
    splits = tl.cdiv(pixels, chunk)
    n, split, first_group = _program(splits, NUM_GROUPS, BLOCK_G)
    x += n * pixels * (NUM_GROUPS * GROUP_SIZE)
    first = split * chunk
    last = tl.minimum(first + chunk, pixels)
    # Every lane keeps moments of its own: the loop needs no exchange between threads.
    mean = widened(tl.zeros((BLOCK_P, BLOCK_G, BLOCK_J), x.dtype.element_ty))
    m2 = tl.zeros_like(mean)
    for start in range(first, last, BLOCK_P):
        channel, exists, base, offset, mask = _tile(
            start, last, first_group, pixels, CHANNELS_LAST, NUM_GROUPS, GROUP_SIZE,
            BLOCK_P, BLOCK_G, BLOCK_J)  # fmt: skip
        value = widened(tl.load(x + base + offset, mask, 0.0))
        number = (start - first) // BLOCK_P + 1
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta * (1.0 / number.to(mean.dtype))
        m2 += delta * (value - mean)
    # Lane i of the pixels saw one value every BLOCK_P from first + i on.
    seen = tl.maximum(last - first - tl.arange(0, BLOCK_P) + BLOCK_P - 1, 0) // BLOCK_P
    inside = tl.arange(0, BLOCK_J) < GROUP_SIZE
    count = (seen[:, None, None] * inside[None, None, :]).to(mean.dtype)
    merged = _sum(count * mean) / ((last - first) * GROUP_SIZE).to(mean.dtype)
    apart = mean - merged[None, :, None]
    g = first_group + tl.arange(0, BLOCK_G)
    place = partial + _workspace(n, g, NUM_GROUPS, SPLITS) + split
    tl.store(place, merged, g < NUM_GROUPS)
    tl.store(place + NUM_GROUPS * SPLITS, _sum(m2 + count * apart * apart), g < NUM_GROUPS)


@triton.jit
def _normalise(x, y, partial, statistics, weight, bias, scale, shift,
               scale_n: tl.int64, shift_n: tl.int64,
               pixels: tl.int64, chunk: tl.int64, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
               WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
               CHANNELS_LAST: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
               BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr,
               RESIDENT: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """One tile of y; mean and 1 / deviation of its groups -> statistics (N,2,G)."""
    pixels, chunk = tl.cast(pixels, tl.int64), tl.cast(chunk, tl.int64)
    n, block, first_group = _program(tl.cdiv(pixels, BLOCK_P), NUM_GROUPS, BLOCK_G)
    image = n * pixels * (NUM_GROUPS * GROUP_SIZE)
    channel, exists, base, offset, mask = _tile(
        block * BLOCK_P, pixels, first_group, pixels, CHANNELS_LAST, NUM_GROUPS,
        GROUP_SIZE, BLOCK_P, BLOCK_G, BLOCK_J)  # fmt: skip
    value = widened(tl.load(x + image + base + offset, mask, 0.0))
    total = tl.cast(pixels * GROUP_SIZE, value.dtype)
    g = first_group + tl.arange(0, BLOCK_G)
    if RESIDENT:
        mean = _sum(value) / total
        apart = tl.where(mask, value - mean[None, :, None], 0.0)
        m2 = _sum(apart * apart)
    else:
        s = tl.arange(0, SPLITS)[None, :]
        count = tl.maximum(tl.minimum(pixels - s * chunk, chunk), 0) * GROUP_SIZE
        count = count.to(value.dtype)
        there = (count > 0) & (g < NUM_GROUPS)[:, None]
        place = partial + _workspace(n, g, NUM_GROUPS, SPLITS)[:, None] + s
        means = tl.load(place, there, 0.0)
        mean = tl.sum(count * means, 1) / total
        apart = means - mean[:, None]
        m2 = tl.load(place + NUM_GROUPS * SPLITS, there, 0.0) + count * apart * apart
        m2 = tl.sum(tl.where(there, m2, 0.0), 1)
    inverse = 1.0 / tl.sqrt(m2 / total + EPS)
    place = statistics + n * 2 * NUM_GROUPS + g
    tl.store(place, mean, (block == 0) & (g < NUM_GROUPS))
    tl.store(place + NUM_GROUPS, inverse, (block == 0) & (g < NUM_GROUPS))
    a, b = _affine(weight, bias, scale, shift, scale_n, shift_n, n, value, channel, exists,
                   WEIGHT, BIAS, SCALE, SHIFT)  # fmt: skip
    u = (value - mean[None, :, None]) * inverse[None, :, None] * a[None, :, :] + b[None, :, :]
    if ACTIVATION:
        u *= tl.sigmoid(u)
    tl.store(y + image + base + offset, u.to(y.dtype.element_ty), mask)


@triton.jit
def _pulled(dy, x, statistics, base, offset, mask, a, b, n, g, ACTIVATION: tl.constexpr,
            NUM_GROUPS: tl.constexpr):  # fmt: skip
    """h and v of a tile (P,G,J) and 1 / deviation (G,); v is 0 where there is nothing."""
    place = statistics + n * 2 * NUM_GROUPS + g
    mean = tl.load(place, g < NUM_GROUPS, 0.0)
    inverse = tl.load(place + NUM_GROUPS, g < NUM_GROUPS, 0.0)
    h = (widened(tl.load(x + base + offset, mask, 0.0)) - mean[None, :, None]) * inverse[
        None, :, None
    ]
    v = widened(tl.load(dy + base + offset, mask, 0.0))
    if ACTIVATION:
        u = h * a[None, :, :] + b[None, :, :]
        s = tl.sigmoid(u)
        v *= s * (1.0 + u * (1.0 - s))
    return h, v, inverse


@triton.jit
def _gradient_sums(dy, x, statistics, sums, partial, weight, bias, scale, shift,
                   scale_n: tl.int64, shift_n: tl.int64,
                   pixels: tl.int64, chunk: tl.int64, ACTIVATION: tl.constexpr,
                   WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
                   SHIFT: tl.constexpr, CHANNELS_LAST: tl.constexpr, NUM_GROUPS: tl.constexpr,
                   GROUP_SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
                   BLOCK_J: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """S0 and S1 over a chunk of pixels -> sums (N, splits, 2, C), and sum_c a S0, sum_c a S1."""
    pixels, chunk = tl.cast(pixels, tl.int64), tl.cast(chunk, tl.int64)
    splits = tl.cdiv(pixels, chunk)
    n, split, first_group = _program(splits, NUM_GROUPS, BLOCK_G)
    CHANNELS: tl.constexpr = NUM_GROUPS * GROUP_SIZE
    image = n * pixels * CHANNELS
    first = split * chunk
    last = tl.minimum(first + chunk, pixels)
    g = first_group + tl.arange(0, BLOCK_G)
    sum0 = widened(tl.zeros((BLOCK_P, BLOCK_G, BLOCK_J), x.dtype.element_ty))
    sum1 = tl.zeros_like(sum0)
    channel, exists, base, offset, mask = _tile(
        first, last, first_group, pixels, CHANNELS_LAST, NUM_GROUPS, GROUP_SIZE,
        BLOCK_P, BLOCK_G, BLOCK_J)  # fmt: skip
    a, b = _affine(weight, bias, scale, shift, scale_n, shift_n, n, sum0, channel, exists,
                   WEIGHT, BIAS, SCALE, SHIFT)  # fmt: skip
    for start in range(first, last, BLOCK_P):
        channel, exists, base, offset, mask = _tile(
            start, last, first_group, pixels, CHANNELS_LAST, NUM_GROUPS, GROUP_SIZE,
            BLOCK_P, BLOCK_G, BLOCK_J)  # fmt: skip
        h, v, inverse = _pulled(
            dy, x, statistics, image + base, offset, mask, a, b, n, g, ACTIVATION,
            NUM_GROUPS)  # fmt: skip
        sum0 += v
        sum1 += v * h
    sum0, sum1 = tl.sum(sum0, 0), tl.sum(sum1, 0)
    place = sums + (n * splits + split) * (2 * CHANNELS) + channel
    tl.store(place, sum0, exists)
    tl.store(place + CHANNELS, sum1, exists)
    place = partial + _workspace(n, g, NUM_GROUPS, SPLITS) + split
    tl.store(place, tl.sum(a * sum0, 1), g < NUM_GROUPS)
    tl.store(place + NUM_GROUPS * SPLITS, tl.sum(a * sum1, 1), g < NUM_GROUPS)


@triton.jit
def _gradient(dy, x, dx, statistics, sums, partial, weight, bias, scale, shift,
              scale_n: tl.int64, shift_n: tl.int64,
              pixels: tl.int64, chunk: tl.int64, ACTIVATION: tl.constexpr,
              WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
              CHANNELS_LAST: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
              BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr,
              RESIDENT: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """One tile of dx; where a program holds the whole group, its S0 and S1 too."""
    pixels, chunk = tl.cast(pixels, tl.int64), tl.cast(chunk, tl.int64)
    n, block, first_group = _program(tl.cdiv(pixels, BLOCK_P), NUM_GROUPS, BLOCK_G)
    CHANNELS: tl.constexpr = NUM_GROUPS * GROUP_SIZE
    image = n * pixels * CHANNELS
    channel, exists, base, offset, mask = _tile(
        block * BLOCK_P, pixels, first_group, pixels, CHANNELS_LAST, NUM_GROUPS,
        GROUP_SIZE, BLOCK_P, BLOCK_G, BLOCK_J)  # fmt: skip
    g = first_group + tl.arange(0, BLOCK_G)
    like = widened(tl.zeros((1,), x.dtype.element_ty))
    a, b = _affine(weight, bias, scale, shift, scale_n, shift_n, n, like, channel, exists,
                   WEIGHT, BIAS, SCALE, SHIFT)  # fmt: skip
    h, v, inverse = _pulled(
        dy, x, statistics, image + base, offset, mask, a, b, n, g, ACTIVATION,
        NUM_GROUPS)  # fmt: skip
    if RESIDENT:
        sum0, sum1 = tl.sum(v, 0), tl.sum(v * h, 0)
        tl.store(sums + n * (2 * CHANNELS) + channel, sum0, exists)
        tl.store(sums + n * (2 * CHANNELS) + CHANNELS + channel, sum1, exists)
        mean0, mean1 = tl.sum(a * sum0, 1), tl.sum(a * sum1, 1)
    else:
        s = tl.arange(0, SPLITS)[None, :]
        there = (s * chunk < pixels) & (g < NUM_GROUPS)[:, None]
        place = partial + _workspace(n, g, NUM_GROUPS, SPLITS)[:, None] + s
        mean0 = tl.sum(tl.load(place, there, 0.0), 1)
        mean1 = tl.sum(tl.load(place + NUM_GROUPS * SPLITS, there, 0.0), 1)
    total = tl.cast(pixels * GROUP_SIZE, h.dtype)
    result = v * a[None, :, :] - (mean0 / total)[None, :, None]
    result = (result - h * (mean1 / total)[None, :, None]) * inverse[None, :, None]
    tl.store(dx + image + base + offset, result.to(dx.dtype.element_ty), mask)


@triton.jit
def _parameter_gradients(sums, weight, bias, scale, scale_n: tl.int64, dweight, dbias, dscale,
                         dshift, samples: tl.int64, splits, CHANNELS: tl.constexpr,
                         WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
                         SHIFT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
                         BLOCK_C: tl.constexpr):  # fmt: skip
    """Gradients of BLOCK_C channels' parameters from sums (N, splits, 2, C)."""
    samples = tl.cast(samples, tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    s = tl.arange(0, BLOCK_S)[None, :, None]
    zero = tl.zeros((BLOCK_C,), sums.dtype.element_ty)
    g = zero + 1.0
    if WEIGHT:
        g = tl.load(weight + c, real, 0.0).to(zero.dtype)
    b = zero
    if BIAS:
        b = tl.load(bias + c, real, 0.0).to(zero.dtype)
    total0, total1 = zero, zero
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # 64-bit, as samples is
        place = sums + (n[:, None, None] * splits + s) * (2 * CHANNELS) + c[None, None, :]
        there = (n < samples)[:, None, None] & (s < splits) & real[None, None, :]
        s0 = tl.sum(tl.load(place, there, 0.0), 1)
        s1 = tl.sum(tl.load(place + CHANNELS, there, 0.0), 1)
        row = n[:, None] * CHANNELS + c[None, :]
        there = (n < samples)[:, None] & real[None, :]
        if SHIFT:
            tl.store(dshift + row, s0.to(dshift.dtype.element_ty), there)
        if SCALE:
            tl.store(dscale + row, (g * s1 + b * s0).to(dscale.dtype.element_ty), there)
            given = scale + n[:, None] * scale_n + c[None, :]
            factor = 1.0 + tl.load(given, there, 0.0).to(zero.dtype)
            s0 *= factor
            s1 *= factor
        total0 += tl.sum(s0, 0)
        total1 += tl.sum(s1, 0)
    if WEIGHT:
        tl.store(dweight + c, total1.to(dweight.dtype.element_ty), real)
    if BIAS:
        tl.store(dbias + c, total0.to(dbias.dtype.element_ty), real)


class _Plan:
    """How a call is cut into programs; depends on the shape of an image, not on their number, so
    that an image's result does not depend on its neighbours."""

    def __init__(self, x: Tensor, num_groups: int):
        n, c, h, w = x.shape
        self.pixels = h * w
        channels_last = is_channels_last(x)
        group_size = c // num_groups
        block_j = triton.next_power_of_2(group_size)
        block_g = 1
        size = next((size for size in RESIDENT if self.pixels * block_j <= size), None)
        self.resident = size is not None
        if not self.resident:
            size = TILE
            if channels_last:
                block_g = min(triton.next_power_of_2(num_groups), max(1, 1024 // block_j))
        block_p = max(1, size // (block_j * block_g))
        tiles = cdiv(self.pixels, block_p)
        self.chunk = cdiv(tiles, SPLITS) * block_p
        self.splits = cdiv(self.pixels, self.chunk)
        blocks = cdiv(num_groups, block_g)
        self.by_tile = (n * tiles * blocks,)
        self.by_chunk = (n * self.splits * blocks,)
        self.constants = {
            "CHANNELS_LAST": channels_last, "NUM_GROUPS": num_groups, "GROUP_SIZE": group_size,
            "SPLITS": SPLITS,
        }  # fmt: skip
        tile = {"BLOCK_P": block_p, "BLOCK_G": block_g, "BLOCK_J": block_j}
        self.configs = [triton.Config(tile, num_warps=RESIDENT[size] if self.resident else 4)]

    def workspace(self, x: Tensor) -> Tensor:
        """Two results a group and split; of no use to resident groups."""
        groups = 0 if self.resident else self.constants["NUM_GROUPS"]
        return x.new_empty((len(x), 2, groups, SPLITS), dtype=wide(x))


def _parameters(x: Tensor, **given: Tensor | None):
    """Pointers, with ``x`` in place of what is missing, the strides of scale and shift from image
    to image, and the constants that tell what is there."""
    tensors = []
    for y in given.values():
        if y is not None and y.stride(-1) != 1:
            y = y.contiguous()  # else rows may lie anywhere: slices of one matrix, or all in one
        tensors.append(x if y is None else y)
    strides = [y.stride(0) for y in tensors[2:]]
    return tensors, strides, {name.upper(): y is not None for name, y in given.items()}


def _fake_forward(x, weight, bias, scale, shift, num_groups, eps, activation):
    return empty_4d(x, x.shape), x.new_empty((len(x), 2, num_groups), dtype=wide(x))


@operator(_fake_forward)
def group_norm_silu_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, num_groups: int, eps: float, activation: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the mean and 1 / deviation of every group (N,2,G) in float32 at least."""
    x = dense(x, x)
    y, statistics = _fake_forward(x, weight, bias, scale, shift, num_groups, eps, activation)
    if x.numel() == 0:
        return y, statistics
    plan = _Plan(x, num_groups)
    partial = plan.workspace(x)
    if not plan.resident:
        launch(
            _moments, plan.configs, lambda meta: plan.by_chunk,
            x, partial, plan.pixels, plan.chunk, **plan.constants,
        )  # fmt: skip
    tensors, strides, given = _parameters(x, weight=weight, bias=bias, scale=scale, shift=shift)
    launch(
        _normalise, plan.configs, lambda meta: plan.by_tile,
        x, y, partial, statistics, *tensors, *strides, plan.pixels, plan.chunk,
        EPS=eps, ACTIVATION=activation, RESIDENT=plan.resident, **given, **plan.constants,
    )  # fmt: skip
    return y, statistics


def _fake_backward(
    dy, x, statistics, weight, bias, scale, shift, num_groups, activation, parameters
):
    gradients = (
        x.new_empty(0) if y is None or not parameters else torch.empty_like(y).contiguous()
        for y in (weight, bias, scale, shift)
    )
    return (empty_4d(x, x.shape), *gradients)


@operator(_fake_backward)
def group_norm_silu_backward(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, num_groups: int, activation: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, scale and shift, the last four empty where the argument is
    None or ``parameters`` is false."""
    x = dense(x, x)
    dy = dense(dy, x)
    dx, *gradients = _fake_backward(
        dy, x, statistics, weight, bias, scale, shift, num_groups, activation, parameters
    )
    if x.numel() == 0:
        return (dx, *(g.zero_() for g in gradients))
    plan = _Plan(x, num_groups)
    partial = plan.workspace(x)
    splits = 1 if plan.resident else plan.splits
    sums = x.new_empty((len(x), splits, 2, x.shape[1]), dtype=wide(x))
    tensors, strides, given = _parameters(x, weight=weight, bias=bias, scale=scale, shift=shift)
    constants = plan.constants | given | {"ACTIVATION": activation}
    if not plan.resident:
        launch(
            _gradient_sums, plan.configs, lambda meta: plan.by_chunk,
            dy, x, statistics, sums, partial, *tensors, *strides, plan.pixels, plan.chunk,
            **constants,
        )  # fmt: skip
    launch(
        _gradient, plan.configs, lambda meta: plan.by_tile,
        dy, x, dx, statistics, sums, partial, *tensors, *strides, plan.pixels, plan.chunk,
        RESIDENT=plan.resident, **constants,
    )  # fmt: skip
    if parameters and any(given.values()):
        channels = x.shape[1]
        launch(
            _parameter_gradients, _PARAMETER_CONFIGS[plan.resident],
            lambda meta: (cdiv(channels, meta["BLOCK_C"]),),
            sums, *tensors[:3], strides[0], *gradients, len(x), splits, CHANNELS=channels, **given,
        )  # fmt: skip
    return (dx, *gradients)


# Sums of resident groups are a row an image, those of others up to SPLITS rows.
_PARAMETER_CONFIGS = {
    True: [triton.Config({"BLOCK_N": 64, "BLOCK_S": 1, "BLOCK_C": 16}, num_warps=4)],
    False: [triton.Config({"BLOCK_N": 4, "BLOCK_S": SPLITS, "BLOCK_C": 16}, num_warps=4)],
}


def _setup(ctx, inputs, output):
    x, weight, bias, scale, shift, ctx.num_groups, _, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # which would fill one with zeros for it
    ctx.save_for_backward(x, output[1], weight, bias, scale, shift)


def _backward(ctx, dy, _):
    checks.differentiated_once("group_norm_silu")
    x, statistics, *given = ctx.saved_tensors
    gradients = group_norm_silu_backward(
        dy, x, statistics, *given, ctx.num_groups, ctx.activation, any(ctx.needs_input_grad[1:5])
    )
    wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None)


group_norm_silu_forward.register_autograd(_backward, setup_context=_setup)


def group_norm_silu(
    x, num_groups, weight=None, bias=None, eps=1e-5, scale=None, shift=None, activation=True
):
    """See ``ops.group_norm_silu``; parameters may have another dtype than ``x``."""
    return group_norm_silu_forward(
        x, weight, bias, scale, shift, num_groups, eps, activation
    )[0]


def _variant(kernel, channels_last: bool, size: int | None, capability: int):
    """For bfloat16 activations of 80 channels in 5 groups and float32 parameters."""
    groups = 8 if channels_last and size is None else 1
    tile = {"BLOCK_P": (size or TILE) // (16 * groups), "BLOCK_G": groups, "BLOCK_J": 16}
    config = triton.Config(tile, num_warps=RESIDENT.get(size, 4))
    if kernel is _parameter_gradients:
        (config,) = _PARAMETER_CONFIGS[size is not None]
    constants = {
        "EPS": 1e-5, "ACTIVATION": True, "WEIGHT": True, "BIAS": True, "SCALE": True,
        "SHIFT": True, "CHANNELS_LAST": channels_last, "NUM_GROUPS": 5, "GROUP_SIZE": 16,
        "SPLITS": SPLITS, "RESIDENT": size is not None, "CHANNELS": 80,
    }  # fmt: skip
    types = {p.name: "*fp32" for p in kernel.params if not p.is_constexpr}
    special = dict.fromkeys(("x", "y", "dy", "dx"), "*bf16")
    special |= dict.fromkeys(("pixels", "chunk", "samples", "scale_n", "shift_n"), "i64")
    special |= {"splits": "i32"}
    types |= {name: kind for name, kind in special.items() if name in types}
    constants = {p.name: constants[p.name] for p in kernel.params if p.name in constants}
    return source(kernel, config, types, **constants)


COMPILE = {
    f"{kernel.__name__[1:]}, {'resident' if size else 'split'}, "
    f"{'channels_last' if last else 'contiguous'}": functools.partial(_variant, kernel, last, size)
    for kernel, sizes in (
        (_moments, [None]), (_normalise, [16384, None]), (_gradient_sums, [None]),
        (_gradient, [16384, None]), (_parameter_gradients, [16384, None]),
    )
    for size in sizes
    for last in ((True, False) if kernel is not _parameter_gradients else (True,))
}  # fmt: skip
