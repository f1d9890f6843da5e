"""The anomaly map: every input read once, one map written and smoothed.

1. For each level of features a small map of 1 - cosine at the features' own resolution.
2. One pass over x and x_hat in tiles of whole 2^levels blocks. A tile's difference d gives, channel
   by channel, its share of mean |d| and, since the transform is linear, of the sub-bands' errors:
   Haar butterflies on the tile itself. No sub-band reaches memory. The cosines are interpolated on
   the fly; each map is standardised, weighted and added.
3. The Gaussian, one axis after the other. With T a tile and its halo of the radius R, the smoothed
   tile is T V for the band matrix V[k, j] = g(k - j - R): a small matrix product, which tensor
   cores do in less time than 2 R + 1 shifted additions would take, for any R. It runs in 3xTF32,
   as precise as float32 sums. Reflection at the borders happens in the indices. (Both axes in one
   program would save writing and reading one map, but need a halo on four sides: four times the
   tile's own size at the default sigma, too many registers.)

The score is PyTorch's ``topk``: its cost is that of a radix selection already.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registration import cdiv, dense, launch, operator, source

MAX_LEVELS = 4
MAX_FEATURES = 4
EPS = 1e-8  # of the cosine, as in the reference


@triton.jit
def _cosines(f, f_hat, result, pixels: tl.int64, CHANNELS_LAST: tl.constexpr,
             CHANNELS: tl.constexpr, EPS: tl.constexpr,
             BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """1 - cosine over channels of BLOCK_P pixels of a dense image -> (N, pixels)."""
    pixels = tl.cast(pixels, tl.int64)
    program = tl.program_id(0)
    blocks = tl.cdiv(pixels, BLOCK_P)
    n = (program // blocks).to(tl.int64)
    p = (program % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    f += n * pixels * CHANNELS
    f_hat += n * pixels * CHANNELS
    dot = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square, square_hat = dot, dot
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (p < pixels)[:, None] & (c < CHANNELS)[None, :]
        if CHANNELS_LAST:
            place = p[:, None] * CHANNELS + c[None, :]
        else:
            place = c[None, :] * pixels + p[:, None]
        a = tl.load(f + place, mask, 0.0).to(tl.float32)
        b = tl.load(f_hat + place, mask, 0.0).to(tl.float32)
        dot += a * b
        square += a * a
        square_hat += b * b
    norm = tl.maximum(tl.sqrt(tl.sum(square, 1)), EPS)
    norm_hat = tl.maximum(tl.sqrt(tl.sum(square_hat, 1)), EPS)
    distance = 1.0 - tl.sum(dot, 1) / norm / norm_hat
    tl.store(result + n * pixels + p, distance, p < pixels)


@triton.jit
def _interpolated(cosines, n, i, j, height, width, h, w, mask):
    """Bilinear, align_corners=False: output i lies at (i + 1/2) h / height - 1/2 of the input.

    As a fraction with the denominator 2 height, exact in integers: of 32 bits, see ``refuses``.
    """
    i, j = i.to(tl.int32), j.to(tl.int32)
    height, width = tl.cast(height, tl.int32), tl.cast(width, tl.int32)
    y = tl.maximum((2 * i + 1) * h - height, 0)
    x = tl.maximum((2 * j + 1) * w - width, 0)
    top, left = y // (2 * height), x // (2 * width)
    v = ((y % (2 * height)).to(tl.float32) / tl.cast(2 * height, tl.float32))[:, None]
    u = ((x % (2 * width)).to(tl.float32) / tl.cast(2 * width, tl.float32))[None, :]
    cosines += n * h * w
    rows = top[:, None] * w
    below = tl.minimum(top + 1, h - 1)[:, None] * w
    right = tl.minimum(left + 1, w - 1)[None, :]
    left = left[None, :]
    first = tl.load(cosines + rows + left, mask, 0.0) * (1.0 - u)
    first += tl.load(cosines + rows + right, mask, 0.0) * u
    second = tl.load(cosines + below + left, mask, 0.0) * (1.0 - u)
    second += tl.load(cosines + below + right, mask, 0.0) * u
    return first * (1.0 - v) + second * v


@triton.jit
def _standardised(value, mean, deviation, place, mask, KIND: tl.constexpr):
    """KIND 0: as it is, 1: by scalars, 2: by position."""
    if KIND == 1:
        value = (value - tl.load(mean).to(tl.float32)) / tl.load(deviation).to(tl.float32)
    elif KIND == 2:
        value -= tl.load(mean + place, mask, 0.0).to(tl.float32)
        value /= tl.load(deviation + place, mask, 1.0).to(tl.float32)
    return value


@triton.jit
def _butterfly(x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Low band of a tile, and the sum of the magnitudes of the other three."""
    blocks = tl.permute(tl.reshape(x, (HEIGHT // 2, 2, WIDTH // 2, 2)), (0, 2, 1, 3))
    left, right = tl.split(blocks)
    a, c = tl.split(left)
    b, d = tl.split(right)
    sum_top, sum_bottom, top, bottom = a + b, c + d, a - b, c - d
    magnitude = tl.abs(sum_top - sum_bottom) + tl.abs(top + bottom) + tl.abs(top - bottom)
    return (sum_top + sum_bottom) * 0.5, magnitude * 0.5


@triton.jit
def _doubled(x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(HEIGHT, WIDTH) -> (2 HEIGHT, 2 WIDTH), each value four times."""
    x = tl.broadcast_to(x[:, None, :, None], (HEIGHT, 2, WIDTH, 2))
    return tl.reshape(x, (2 * HEIGHT, 2 * WIDTH))


@triton.jit
def _weighted(x, x_hat, cosines0, cosines1, cosines2, cosines3, mean0, mean1, mean2,
              deviation0, deviation1, deviation2, base, result,
              height: tl.int64, width: tl.int64, x_n: tl.int64, x_c: tl.int64, x_h: tl.int64,
              y_n: tl.int64, y_c: tl.int64, y_h: tl.int64,
              h0, w0, h1, w1, h2, w2, h3, w3, weight0, weight1, weight2,
              X_W: tl.constexpr, Y_W: tl.constexpr, CHANNELS: tl.constexpr, PIXEL: tl.constexpr,
              BASE: tl.constexpr, FEATURES: tl.constexpr, LEVELS: tl.constexpr, KIND0: tl.constexpr,
              KIND1: tl.constexpr, KIND2: tl.constexpr,
              BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """The weighted sum of the standardised maps, and of base, for one tile of an image."""
    weight0, weight1 = tl.cast(weight0, tl.float32), tl.cast(weight1, tl.float32)
    weight2 = tl.cast(weight2, tl.float32)
    height, width = tl.cast(height, tl.int64), tl.cast(width, tl.int64)
    program = tl.program_id(0)
    across = tl.cdiv(width, BLOCK_W)
    tiles = tl.cdiv(height, BLOCK_H) * across
    n, tile = (program // tiles).to(tl.int64), (program % tiles).to(tl.int64)
    i = tile // across * BLOCK_H + tl.arange(0, BLOCK_H)
    j = tile % across * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (i < height)[:, None] & (j < width)[None, :]
    place = i[:, None] * width + j[None, :]
    total = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    if BASE:
        total += tl.load(base + n * height * width + place, mask, 0.0).to(tl.float32)
    if PIXEL or LEVELS > 0:
        x += n * x_n + i[:, None] * x_h + j[None, :] * X_W
        x_hat += n * y_n + i[:, None] * y_h + j[None, :] * Y_W
        pixel = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
        bands1 = tl.zeros((BLOCK_H // 2, BLOCK_W // 2), tl.float32)
        bands2 = tl.zeros((BLOCK_H // 4, BLOCK_W // 4), tl.float32)
        bands3 = tl.zeros((BLOCK_H // 8, BLOCK_W // 8), tl.float32)
        bands4 = tl.zeros((BLOCK_H // 16, BLOCK_W // 16), tl.float32)
        for _ in range(CHANNELS):
            d = tl.load(x, mask, 0.0).to(tl.float32) - tl.load(x_hat, mask, 0.0).to(tl.float32)
            x += x_c
            x_hat += y_c
            if PIXEL:
                pixel += tl.abs(d)
            if LEVELS >= 1:
                low1, detail = _butterfly(d, BLOCK_H, BLOCK_W)
                bands1 += detail
                if LEVELS == 1:
                    bands1 += tl.abs(low1)
            if LEVELS >= 2:
                low2, detail = _butterfly(low1, BLOCK_H // 2, BLOCK_W // 2)
                bands2 += detail
                if LEVELS == 2:
                    bands2 += tl.abs(low2)
            if LEVELS >= 3:
                low3, detail = _butterfly(low2, BLOCK_H // 4, BLOCK_W // 4)
                bands3 += detail
                if LEVELS == 3:
                    bands3 += tl.abs(low3)
            if LEVELS >= 4:
                low4, detail = _butterfly(low3, BLOCK_H // 8, BLOCK_W // 8)
                bands4 += detail + tl.abs(low4)
        if PIXEL:
            z = _standardised(pixel / CHANNELS, mean0, deviation0, place, mask, KIND0)
            total += weight0 * z
        if LEVELS >= 4:
            bands3 += _doubled(bands4, BLOCK_H // 16, BLOCK_W // 16)
        if LEVELS >= 3:
            bands2 += _doubled(bands3, BLOCK_H // 8, BLOCK_W // 8)
        if LEVELS >= 2:
            bands1 += _doubled(bands2, BLOCK_H // 4, BLOCK_W // 4)
        if LEVELS >= 1:
            bands = _doubled(bands1, BLOCK_H // 2, BLOCK_W // 2)
            z = _standardised(bands / CHANNELS, mean2, deviation2, place, mask, KIND2)
            total += weight2 * z
    if FEATURES > 0:
        distance = _interpolated(cosines0, n, i, j, height, width, h0, w0, mask)
        if FEATURES > 1:
            distance += _interpolated(cosines1, n, i, j, height, width, h1, w1, mask)
        if FEATURES > 2:
            distance += _interpolated(cosines2, n, i, j, height, width, h2, w2, mask)
        if FEATURES > 3:
            distance += _interpolated(cosines3, n, i, j, height, width, h3, w3, mask)
        total += weight1 * _standardised(distance, mean1, deviation1, place, mask, KIND1)
    tl.store(result + n * height * width + place, total, mask)


@triton.jit
def _reflected(i, size):
    """Index of sample i of a signal that is mirrored at its ends, d c b a | a b c d | d c b a."""
    i = (i % (2 * size) + 2 * size) % (2 * size)
    return tl.minimum(i, 2 * size - 1 - i)


@triton.jit
def _gaussian(distance, radius, minus_half_by_variance, norm):
    weight = tl.exp((distance * distance).to(tl.float32) * minus_half_by_variance) * norm
    return tl.where(tl.abs(distance) <= radius, weight, 0.0)


@triton.jit
def _blur(x, result, height: tl.int64, width: tl.int64, radius, minus_half_by_variance, norm,
          ALONG_ROWS: tl.constexpr, SIDE: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A tile of SIDE x SIDE outputs of the Gaussian along one axis."""
    minus_half_by_variance = tl.cast(minus_half_by_variance, tl.float32)
    norm = tl.cast(norm, tl.float32)
    height, width = tl.cast(height, tl.int64), tl.cast(width, tl.int64)
    program = tl.program_id(0)
    across = tl.cdiv(width, SIDE)
    tiles = tl.cdiv(height, SIDE) * across
    n, tile = program // tiles, program % tiles
    x += n * height * width
    result += n * height * width
    side = tl.arange(0, SIDE)
    first_row = (tile // across * SIDE).to(tl.int32)
    first_column = (tile % across * SIDE).to(tl.int32)
    rows, columns = first_row + side, first_column + side
    height, wide = tl.cast(height, tl.int32), tl.cast(width, tl.int32)  # offsets stay in 64 bits
    # Rows and columns behind the end are computed for nothing, from the last ones.
    row, column = tl.minimum(rows, height - 1), tl.minimum(columns, wide - 1)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, SIDE + 2 * radius, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K) - radius  # counted from the tile's first output
        if ALONG_ROWS:
            band = _gaussian(k[:, None] - side[None, :], radius, minus_half_by_variance, norm)
            k = _reflected(first_column + k, wide)
            value = tl.load(x + row[:, None] * width + k[None, :])
            total = tl.dot(value, band, total, input_precision="tf32x3")
        else:
            band = _gaussian(k[None, :] - side[:, None], radius, minus_half_by_variance, norm)
            k = _reflected(first_row + k, height)
            value = tl.load(x + k[:, None] * width + column[None, :])
            total = tl.dot(band, value, total, input_precision="tf32x3")
    mask = (rows < height)[:, None] & (columns < wide)[None, :]
    tl.store(result + rows[:, None] * width + columns[None, :], total, mask)


def _cosine_configs(channels: int) -> list[triton.Config]:
    block = min(triton.next_power_of_2(channels), 64)
    return [triton.Config({"BLOCK_P": 2048 // block, "BLOCK_C": block}, num_warps=4)]


_BLUR_CONFIGS = [triton.Config({"SIDE": 64, "BLOCK_K": 32}, num_warps=8, num_stages=2)]


def _weighted_configs(levels: int) -> list[triton.Config]:
    """Wide tiles for long reads, of whole blocks of the coarsest level."""
    height = 16 if levels == MAX_LEVELS else 8
    return [triton.Config({"BLOCK_H": height, "BLOCK_W": 1024 // height}, num_warps=8)]


def _fake_weighted(x, *_):
    n, _, height, width = x.shape
    return x.new_empty((n, height, width), dtype=torch.float32)


@operator(_fake_weighted)
def weighted_map(
    x: Tensor, x_hat: Tensor, features: list[Tensor], features_hat: list[Tensor],
    weights: list[float], levels: int, pixel: bool, means: list[Tensor], deviations: list[Tensor],
    base: Tensor | None,
) -> Tensor:  # fmt: skip
    """The weighted sum of the maps that take part, before smoothing.

    ``means`` and ``deviations``: nothing, or for each map tensors of one element or of (H,W),
    empty ones for a map that does not take part. ``base``: contiguous (N,H,W), added to it.
    """
    result = _fake_weighted(x)
    n, channels, height, width = x.shape
    if n == 0:
        return result
    cosines, sizes = [], []
    for f, f_hat in zip(features, features_hat, strict=True):
        f = dense(f, f)
        pixels = f.shape[2] * f.shape[3]
        distance = f.new_empty((n, pixels), dtype=torch.float32)
        launch(
            _cosines, _cosine_configs(f.shape[1]),
            lambda meta, pixels=pixels: (n * cdiv(pixels, meta["BLOCK_P"]),),
            f, dense(f_hat, f), distance, pixels,
            CHANNELS_LAST=not f.is_contiguous(), CHANNELS=f.shape[1], EPS=EPS,
        )  # fmt: skip
        cosines.append(distance)
        sizes += f.shape[2:]
    cosines += [result] * (MAX_FEATURES - len(features))
    sizes += [1] * (2 * MAX_FEATURES - len(sizes))
    kinds = {f"KIND{i}": 0 if not means else _kind(means[i], deviations[i]) for i in range(3)}
    if not means:
        means = deviations = [result] * 3
    launch(
        _weighted, _weighted_configs(levels),
        lambda meta: (
            n * cdiv(height, meta["BLOCK_H"]) * cdiv(width, meta["BLOCK_W"]),
        ),
        x, x_hat, *cosines, *means, *deviations, result if base is None else base, result,
        height, width,
        *x.stride()[:3], *x_hat.stride()[:3], *sizes, *weights,
        X_W=x.stride(3), Y_W=x_hat.stride(3), CHANNELS=channels, PIXEL=pixel,
        BASE=base is not None, FEATURES=len(features), LEVELS=levels, **kinds,
    )  # fmt: skip
    return result


def _kind(mean: Tensor, deviation: Tensor) -> int:
    return 1 if max(mean.numel(), deviation.numel()) == 1 else 2


@operator(lambda x, sigma: torch.empty_like(x))
def blurred_map(x: Tensor, sigma: float) -> Tensor:
    """The Gaussian of a contiguous float32 map (N,H,W)."""
    result = torch.empty_like(x)
    n, height, width = x.shape
    if n == 0:
        return result
    radius = int(4 * sigma + 0.5)
    norm = 1 / math.fsum(math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1))
    half = torch.empty_like(x)
    for values, target, along_rows in ((x, half, True), (half, result, False)):
        launch(
            _blur, _BLUR_CONFIGS,
            lambda meta: (
                n * cdiv(height, meta["SIDE"]) * cdiv(width, meta["SIDE"]),
            ),
            values, target, height, width, radius, -0.5 / sigma**2, norm, ALONG_ROWS=along_rows,
        )  # fmt: skip
    return result


def refuses(x, x_hat, features, features_hat, weights, levels, stats, sigma, top, base):
    """Why the kernels cannot serve a call, or None."""
    given = (x, x_hat, *features, *features_hat, *(() if base is None else (base,)))
    if any(y.dtype == torch.float64 for y in given):
        return "the Triton kernels compute in float32, not float64"
    statistics = [y for entry in stats or () for y in entry or () if isinstance(y, Tensor)]
    if torch.is_grad_enabled() and any(y.requires_grad for y in (*given, *statistics)):
        return "the Triton kernels have no gradient: call it under torch.no_grad()"
    if weights[1] == 0:
        features = ()
    if any(2 * x.shape[a] * (f.shape[a] + 1) >= 1 << 31 for f in features for a in (2, 3)):
        return "the Triton kernels interpolate features in 32-bit integers, too few for these sizes"
    if (weights[2] != 0 and levels > MAX_LEVELS) or len(features) > MAX_FEATURES:
        return f"the Triton kernels take up to {MAX_LEVELS} levels and {MAX_FEATURES} feature maps"
    return None


def anomaly_map(x, x_hat, features, features_hat, weights, levels, stats, sigma, top, base):
    """See ``ops.anomaly_map``."""
    height, width = x.shape[2:]
    pixel = weights[0] != 0
    if weights[1] == 0:
        features = features_hat = ()
    if weights[2] == 0:
        levels = 0
    means: list[Tensor] = []
    deviations: list[Tensor] = []
    if stats is not None:
        for entry, used in zip(stats, (pixel, len(features) > 0, levels > 0), strict=True):
            mean, deviation = (_statistic(y, x.device) for y in (entry if used else (0.0, 1.0)))
            if mean.numel() > 1 or deviation.numel() > 1:
                mean, deviation = (y.expand(height, width).contiguous() for y in (mean, deviation))
            means.append(mean)
            deviations.append(deviation)
    result = weighted_map(
        x, x_hat, list(features), list(features_hat), list(weights), levels, pixel, means,
        deviations, None if base is None else base.contiguous(),
    )  # fmt: skip
    if sigma > 0:
        result = blurred_map(result, sigma)
    count = max(1, round(top * height * width))
    highest = result.flatten(1).topk(count, dim=1, sorted=False).values
    return result, highest.mean(dim=1)


def _statistic(value, device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, device=device)


def _variant(kernel, config, constants, special, capability: int):
    types = {p.name: "*fp32" for p in kernel.params if not p.is_constexpr}
    types |= {p.name: "i64" for p in kernel.params if p.annotation == "i64"}
    return source(kernel, config, types | special, **constants)


def _compiled_weighted(levels: int, dtype: str):
    constants = {
        "X_W": 1, "Y_W": 1, "CHANNELS": 3, "PIXEL": True, "BASE": True, "FEATURES": 3,
        "LEVELS": levels, "KIND0": 2, "KIND1": 2, "KIND2": 2,
    }  # fmt: skip
    special = {f"weight{i}": "fp32" for i in range(3)}
    special |= {f"{axis}{i}": "i32" for axis in "hw" for i in range(MAX_FEATURES)}
    special |= {"x": f"*{dtype}", "x_hat": f"*{dtype}"}
    return functools.partial(_variant, _weighted, _weighted_configs(levels)[0], constants, special)


COMPILE = {
    f"cosines, {'channels_last' if last else 'contiguous'}": functools.partial(
        _variant, _cosines, _cosine_configs(64)[0],
        {"CHANNELS_LAST": last, "CHANNELS": 64, "EPS": EPS}, {"f": "*bf16", "f_hat": "*bf16"},
    )
    for last in (True, False)
} | {
    f"weighted, {levels} levels, {dtype}": _compiled_weighted(levels, dtype)
    for levels, dtype in ((0, "fp32"), (1, "fp32"), (3, "fp32"), (4, "fp32"), (3, "bf16"))
} | {
    f"blur along {'rows' if rows else 'columns'}": functools.partial(
        _variant, _blur, _BLUR_CONFIGS[0], {"ALONG_ROWS": rows},
        {"radius": "i32", "minus_half_by_variance": "fp32", "norm": "fp32"},
    )
    for rows in (True, False)
}  # fmt: skip
