"""The token MLP: a whole loop of its evaluations, and its training loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .exported import as_dtype
from .modes import in_own_dtypes

LAYER_NORM_EPS = 1e-5


class PackedTokenMLP(NamedTuple):
    """The weights of a token MLP of token size D, width W and B blocks, as operators read them.

    All of one dtype (bfloat16, float16, float32 or float64) and on one device.
    """

    W_in: torch.Tensor  # (W,D)
    b_in: torch.Tensor  # (W,)
    W1: torch.Tensor  # (B,W,W), the weight of the block's LayerNorm folded in
    W2: torch.Tensor  # (B,W,W)
    b2: torch.Tensor  # (B,W)
    W_out: torch.Tensor  # (D,W)
    b_out: torch.Tensor  # (D,)

    @classmethod
    def pack(cls, W_in, b_in, norm_weight, norm_bias, W1, b1, W2, b2, W_out, b_out, dtype=None):
        """(PackedTokenMLP, extra bias) from a module's own parameters.

        ``norm_weight``, ``norm_bias`` and ``b1`` are (B,W), the affine parts of the blocks'
        LayerNorms and the bias of W1; the other shapes are those of the fields. With n = LN(h)
        before its affine part, ::

            W1 (norm_weight * n + norm_bias) + b1 = (W1 diag(norm_weight)) n + (W1 norm_bias + b1)

        The first bracket is packed; the second, (B,W), is returned and belongs into every row of
        ``step_bias``, beside the embedding of the step's time. The LayerNorm before W_out is
        followed by SiLU, through which nothing can be folded: it has no affine part.

        ``dtype`` is that of the packed tensors, by default that of W1. Folding is done in float32
        at least, and the extra bias stays in that.
        """
        compute = torch.promote_types(W1.dtype, torch.float32)
        w1, gain = W1.to(compute), norm_weight.to(compute)
        extra = (w1 * norm_bias.to(compute)[:, None, :]).sum(dim=2) + b1.to(compute)
        fields = (W_in, b_in, w1 * gain[:, None, :], W2, b2, W_out, b_out)
        return cls(*(field.to(dtype or W1.dtype) for field in fields)), extra


@in_own_dtypes
def token_mlp_loop(x, weights, step_bias, table):
    """x (M,D), step_bias (S,B,W), table (S,5) -> x_end (M,D), stats (M,S).

    With (c_in, A, Bm, p, q) the row of a step and e_l its biases, ::

        h = W_in (c_in x) + b_in
        h <- h + W2_l SiLU(W1_l LN(h) + e_l) + b2_l        for l = 1 .. B
        m = W_out SiLU(LN(h)) + b_out
        stats[:, step] = mean over j of (p x_j + q m_j)^2
        x <- A x + Bm m

    LN is LayerNorm without affine part, eps 1e-5. Matrix products are in the dtype of the
    weights; x, h and everything else in that of ``x`` or float32, whichever is wider. The result
    x_end has the dtype of ``x``, stats that wider one.
    """
    state = torch.promote_types(x.dtype, torch.float32)
    current = as_dtype(x, state)
    stats = []
    for row, biases in zip(as_dtype(table, state), as_dtype(step_bias, state), strict=True):
        c_in, a, b, p, q = row
        m = _evaluate(c_in * current, weights, biases)
        stats.append((p * current + q * m).square().mean(dim=1))
        current = a * current + b * m
    if not stats:
        return x, torch.empty(len(x), 0, dtype=state, device=x.device)
    return as_dtype(current, x.dtype), torch.stack(stats, dim=1)


@in_own_dtypes
def token_mlp_loss(x, target, weight, weights, step_bias):
    """x, target (M,D), weight (M,), step_bias (S,B,W) -> scalar

        1/M sum over tokens of weight times mean over j of (m_j - target_j)^2

    with m the token MLP of :func:`token_mlp_loop` for the network input x. Tokens s M/S to
    (s + 1) M/S - 1 are at the level of the biases number s.
    """
    state = torch.promote_types(x.dtype, torch.float32)
    biases = step_bias.to(state).repeat_interleave(len(x) // len(step_bias), dim=0)
    m = _evaluate(x.to(state), weights, biases.unbind(dim=1))
    return ((m - target.to(state)).square().mean(dim=1) * weight.to(state)).mean()


def _evaluate(x, weights, biases):
    """The prediction for network inputs x (M,D); biases: for each block (W,) or (M,W)."""
    width, state = weights.W_in.shape[0], x.dtype
    h = _linear(x, weights.W_in) + as_dtype(weights.b_in, state)
    for w1, w2, b2, e in zip(weights.W1, weights.W2, weights.b2, biases, strict=True):
        n = F.layer_norm(h, (width,), eps=LAYER_NORM_EPS)
        h = h + _linear(F.silu(_linear(n, w1) + e), w2) + as_dtype(b2, state)
    n = F.layer_norm(h, (width,), eps=LAYER_NORM_EPS)
    return _linear(F.silu(n), weights.W_out) + as_dtype(weights.b_out, state)


def _linear(x, weight):
    rounded = as_dtype(x, weight.dtype)
    if torch.compiler.is_exporting():
        # As the native kernels: what is rounded goes into the product, not what comes out.
        return F.linear(as_dtype(rounded, x.dtype), as_dtype(weight, x.dtype))
    return as_dtype(F.linear(rounded, weight), x.dtype)
