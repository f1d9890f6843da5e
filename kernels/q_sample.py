"""The forward process, the velocity and the min-SNR weight in one pass.

For a sample at the level t, with s = sqrt(abar[t]) and e = sqrt(1 - abar[t]), noising and the
target of v-prediction are one rotation (Salimans & Ho 2022, appendix D)::

    x_t = s x0 + e noise
    v   = s noise - e x0

whose adjoint is the rotation by the opposite angle: one kernel serves forward and backward, and
each value is read and written once. The weight of a sample's loss (Hang et al. 2023) takes a few
operations on abar[t], in float64 where the table is, and rides along.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.diffusion import PREDICTION_TYPES
from .registration import cdiv, dense, launch, operator, source, widened

TILE = 2048


@triton.jit
def min_snr(alpha, limit, KIND: tl.constexpr):
    """The weight of a sample at abar = alpha; KIND: index into PREDICTION_TYPES."""
    snr = alpha / (1.0 - alpha)
    limit = tl.cast(limit, alpha.dtype)
    weight = tl.minimum(snr, limit)
    if KIND == 0:
        weight = tl.minimum(limit / snr, 1.0)  # also at alpha = 0
    elif KIND == 2:
        weight /= snr + 1.0
    return weight.to(tl.float32)


@triton.jit
def _rotate(a, b, t, alphas_cumprod, first, second, weight, samples: tl.int64, size: tl.int64,
            b_stride: tl.int64, snr_limit, INVERSE: tl.constexpr, HAS_B: tl.constexpr,
            BOTH: tl.constexpr, WEIGHT: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """first = s a + e b and, if BOTH, second = s b - e a, for BLOCK_M values of BLOCK_N samples;
    e of the opposite sign if INVERSE, b = 0 unless HAS_B. WEIGHT: index into
    PREDICTION_TYPES, if there is one to write."""
    program = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK_M)
    row, block = program // blocks, program % blocks
    n = row.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = n < samples
    mask = real[:, None] & (m < size)[None, :]
    place = n[:, None] * size + m[None, :]
    x = widened(tl.load(a + place, mask, 0.0))
    if HAS_B:
        y = widened(tl.load(b + n[:, None] * b_stride + m[None, :], mask, 0.0)).to(x.dtype)
    level = tl.load(t + n, real, 0)
    alpha = widened(tl.load(alphas_cumprod + level, real, 0.5))
    if x.dtype == tl.float64:
        alpha = alpha.to(tl.float64)
    if WEIGHT is not None:
        tl.store(weight + n, min_snr(alpha, snr_limit, WEIGHT), real & (block == 0))
    # 1 - abar cancels near 1 and is taken in the table's precision.
    s = tl.sqrt(alpha.to(x.dtype))[:, None]
    e = tl.sqrt((1.0 - alpha).to(x.dtype))[:, None]
    if INVERSE:
        e = -e
    if HAS_B:
        tl.store(first + place, (s * x + e * y).to(first.dtype.element_ty), mask)
        if BOTH:
            tl.store(second + place, (s * y - e * x).to(second.dtype.element_ty), mask)
    else:
        tl.store(first + place, (s * x).to(first.dtype.element_ty), mask)
        if BOTH:
            tl.store(second + place, (-e * x).to(second.dtype.element_ty), mask)


def _configs(size: int) -> list[triton.Config]:
    """Short samples, which a model's width fixes, share a program."""
    block = min(triton.next_power_of_2(size), TILE)
    return [triton.Config({"BLOCK_N": TILE // block, "BLOCK_M": block}, num_warps=4)]


def _fake(a, b, t, alphas_cumprod, inverse, both, weight, snr_limit):
    first = torch.empty_like(dense(a, a))
    second = torch.empty_like(first) if both else a.new_empty(0)
    n = 0 if weight is None else len(a)
    return first, second, a.new_empty(n, dtype=torch.float32)


@operator(_fake)
def rotation(
    a: Tensor, b: Tensor | None, t: Tensor, alphas_cumprod: Tensor, inverse: bool, both: bool,
    weight: int | None, snr_limit: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the kernel computes; an output that was not asked for is empty."""
    first, second, weights = _fake(a, b, t, alphas_cumprod, inverse, both, weight, snr_limit)
    if a.numel() == 0:
        return first, second, weights.zero_()
    a = dense(a, a)
    size = a[0].numel()
    b_stride = 0 if b is not None and len(b) < len(a) else size
    launch(
        _rotate, _configs(size),
        lambda meta: (
            cdiv(len(a), meta["BLOCK_N"]) * cdiv(size, meta["BLOCK_M"]),
        ),
        a, a if b is None else dense(b, a), t.contiguous(), alphas_cumprod.contiguous(), first,
        second, weights, len(a), size, b_stride, snr_limit,
        INVERSE=inverse, HAS_B=b is not None, BOTH=both, WEIGHT=weight,
    )  # fmt: skip
    return first, second, weights


def _setup(ctx, inputs, output):
    a, b, t, alphas_cumprod, ctx.inverse, ctx.both, *_ = inputs
    ctx.save_for_backward(t, alphas_cumprod)
    ctx.b = None if b is None else (len(b), b.dtype)
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, grad_first, grad_second, _):
    t, alphas_cumprod = ctx.saved_tensors
    grad_a, grad_b, _ = rotation(
        grad_first, grad_second if ctx.both else None, t, alphas_cumprod, not ctx.inverse,
        ctx.needs_input_grad[1], None, 0.0,
    )  # fmt: skip
    if not ctx.needs_input_grad[1]:
        grad_b = None
    else:
        n, dtype = ctx.b
        grad_b = (grad_b.sum(0, keepdim=True) if n < len(grad_b) else grad_b).to(dtype)
    return grad_a, grad_b, None, None, None, None, None, None


rotation.register_autograd(_backward, setup_context=_setup)


def q_sample(x0, t, noise, alphas_cumprod):
    """See ``ops.q_sample``."""
    return rotation(
        x0, noise, t, alphas_cumprod, False, False, None, 0.0
    )[0]


def noised_target(x0, t, noise, alphas_cumprod, prediction_type, snr_limit):
    """See ``ops.noised_target``; a target that is an input is returned as it is."""
    velocity = prediction_type == "v_prediction"
    number = PREDICTION_TYPES.index(prediction_type)
    x_t, target, weight = rotation(
        x0, noise, t, alphas_cumprod, False, velocity, number, snr_limit
    )
    if not velocity:
        target = x0 if prediction_type == "sample" else noise.expand_as(x0).to(x0.dtype)
    return x_t, target, weight


def _variant(dtype: str, both: bool, capability: int):
    types = dict.fromkeys(("a", "b", "first", "second"), f"*{dtype}")
    types |= {"t": "*i64", "alphas_cumprod": "*fp64", "weight": "*fp32", "snr_limit": "fp32"}
    types |= dict.fromkeys(("samples", "size", "b_stride"), "i64")
    (config,) = _configs(TILE)
    constants = {"INVERSE": False, "HAS_B": True, "BOTH": both, "WEIGHT": 2 if both else None}
    return source(_rotate, config, types, **constants)


COMPILE = {
    f"rotate, {'x_t, v and weight' if both else 'x_t alone'}, {dtype}": functools.partial(
        _variant, dtype, both
    )
    for both in (True, False)
    for dtype in ("bf16", "fp32")
}
