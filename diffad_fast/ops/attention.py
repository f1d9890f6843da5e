"""Attention over the sub-bands of the Haar transform."""

from __future__ import annotations

import math

import torch

from .. import native, reference
from . import checks
from .dispatch import Operator, kernel


def _cpu(q, k, v, logit_gain, value_gain, level, scale):
    """The C++ operator takes gains in the type that it computes in, and keeps a log-sum-exp."""
    if scale is None:
        scale = (4**level * q.shape[4]) ** -0.5
    gains = (x if x is None else x.to(_computed_in(q)) for x in (logit_gain, value_gain))
    return torch.ops.diffad_fast.wavelet_attention(q, k, v, *gains, level, float(scale))[0]


def _triton_refuses(q, k, v, logit_gain, value_gain, level, scale):
    """What the Triton kernels were not made for: see kernels/wavelet_attention.py."""
    if q.dtype == torch.float64:
        return "it has no float64"
    if 4**level * q.shape[4] > 512:
        return f"head_dim {q.shape[4]} is more than {512 // 4**level}, its limit at level {level}"
    if q.shape[2] * q.shape[3] > 4**level << 20:
        return f"{q.shape[2]}x{q.shape[3]} pixels are more than 2^20 blocks"
    return None


_wavelet_attention = Operator(
    "wavelet_attention",
    reference.wavelet_attention,
    cpu=_cpu if "cpu" in native.implementations("wavelet_attention") else None,
    triton=kernel("wavelet_attention", "wavelet_attention"),
    refuses={"triton": _triton_refuses},
)


def wavelet_attention(q, k, v, logit_gain=None, value_gain=None, level=1, scale=None):
    """Attention whose tokens are blocks of pixels and whose channels are Haar coefficients.

    q, k, v: (N,heads,H,W,d) of one dtype, H and W divisible by 2^level; level 1 or 2. Blocks of
    2^level x 2^level pixels are the tokens, (H/2^level)(W/2^level) in number. The gains
    (heads, 1 + 3 level) weight the sub-bands in the logits and in the values, coarse to fine: cA,
    cH, cV, cD, or cA2, cH2, cV2, cD2, cH1, cV1, cD1; None is all ones. ``scale`` multiplies the
    logits and defaults to 1/sqrt(4^level d). Returns (N,heads,H,W,d) in the dtype of ``q``.

    S_ij = scale * sum_b w_b <Q_b[i], K_b[j]>, A = softmax_j(S), O_b[i] = g_b sum_j A_ij V_b[j],
    output = inverse Haar of O. With all gains 1 this is attention between blocks of raw pixels,
    since the transform is orthonormal. The GPU's kernel multiplies float32 in full, never in TF32.
    Differentiable in the tensors, once.

    Raises TypeError for dtypes, ValueError for shapes, devices, level and scale.
    """
    checks.tensor("q", q, 5)
    if q.shape[4] == 0:
        raise ValueError(f"q has heads without channels: shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        checks.shaped(name, x, q.shape, q.device)
        checks.same_dtype(name, x, "q", q.dtype)
    level = checks.integer("level", level, 1, 2)
    heads, height, width = q.shape[1:4]
    block = 2**level
    if height % block or width % block:
        raise ValueError(
            f"H and W must be divisible by {block} for level {level}, got {height}x{width}: "
            f"pad or resize the input"
        )
    for name, gain in (("logit_gain", logit_gain), ("value_gain", value_gain)):
        if gain is not None:
            checks.shaped(name, gain, (heads, 1 + 3 * level), q.device)
    if scale is not None:
        scale = checks.number("scale", scale, -math.inf)
    return _wavelet_attention(q, k, v, logit_gain, value_gain, level, scale)


def _computed_in(q):
    return torch.promote_types(q.dtype, torch.float32)


def _empty_as(q):
    """A new tensor of q's shape, its heads within a pixel where q's are (channels_last)."""
    n, heads, h, w, d = q.shape
    if q.stride(1) < q.stride(3):
        return q.new_empty(n, h, w, heads, d).permute(0, 3, 1, 2, 4)
    return q.new_empty(q.shape)


def _fake(q, k, v, logit_gain, value_gain, level, scale):
    n, heads, h, w, _ = q.shape
    tokens = (h // 2**level) * (w // 2**level)
    return _empty_as(q), q.new_empty(n, heads, tokens, dtype=_computed_in(q))


def _fake_backward(grad, q, k, v, logit_gain, value_gain, out, lse, level, scale):
    gains = (
        q.new_empty(0 if gain is None else q.shape[1], 1 + 3 * level, dtype=_computed_in(q))
        for gain in (logit_gain, value_gain)
    )
    return _empty_as(q), _empty_as(q), _empty_as(q), *gains


def _keep(ctx, inputs, output):
    *tensors, ctx.level, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    checks.differentiated_once("wavelet_attention")
    *grads, logit_gain, value_gain = torch.ops.diffad_fast.wavelet_attention_backward(
        grad, *ctx.saved_tensors, ctx.level, ctx.scale
    )
    needs = ctx.needs_input_grad
    return *grads, logit_gain if needs[3] else None, value_gain if needs[4] else None, None, None


if native.loaded():
    torch.library.register_fake("diffad_fast::wavelet_attention", _fake)
    torch.library.register_fake("diffad_fast::wavelet_attention_backward", _fake_backward)
    torch.library.register_autograd(
        "diffad_fast::wavelet_attention", _backward, setup_context=_keep
    )
