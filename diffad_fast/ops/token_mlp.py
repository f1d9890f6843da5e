"""A whole loop of evaluations of the token MLP in one call."""

from __future__ import annotations

from .. import reference
from ..reference import PackedTokenMLP
from . import checks
from .dispatch import Operator

__all__ = ["PackedTokenMLP", "token_mlp_loop"]

_token_mlp_loop = Operator("token_mlp_loop", reference.token_mlp_loop)


def token_mlp_loop(x, weights, step_bias, table):
    """Run S affine steps x <- A x + Bm m(x) of the token MLP m: a reverse process, an inversion,
    or (A = 1, Bm = 0) parallel evaluations of the same x.

    x: (M,D) tokens. weights: :class:`PackedTokenMLP` for D, of width W with B blocks, in
    bfloat16, float16, float32 or float64. step_bias: (S,B,W), per step and block the embedding of
    the time plus the bias that ``PackedTokenMLP.pack`` returns. table: (S,5), a row a step:
    (c_in, A, Bm, p, q). Every unclipped DDIM step with eta = 0 has this form.

    Returns x_end (M,D) in the dtype of ``x`` and stats (M,S) in float32 (float64 for float64 x):
    the mean over D of (p x + q m)^2 with the x before the step's update. The state is kept in
    float32 at least, matrix products are in the dtype of the weights; the equations are in
    ``reference.token_mlp_loop``. Differentiable in all tensors.

    Raises TypeError for dtypes, ValueError for shapes and devices.
    """
    checks.tensor("x", x, 2)
    if not isinstance(weights, PackedTokenMLP):
        raise TypeError(f"weights must be a PackedTokenMLP, got {type(weights).__name__}")
    checks.tensor("W_in", weights.W_in, 2)
    checks.tensor("W1", weights.W1, 3)
    d = x.shape[1]
    width, blocks = weights.W_in.shape[0], weights.W1.shape[0]
    shapes = PackedTokenMLP(
        W_in=(width, d),
        b_in=(width,),
        W1=(blocks, width, width),
        W2=(blocks, width, width),
        b2=(blocks, width),
        W_out=(d, width),
        b_out=(d,),
    )
    for name, tensor, shape in zip(PackedTokenMLP._fields, weights, shapes, strict=True):
        checks.shaped(name, tensor, shape, x.device)
        checks.same_dtype(name, tensor, "W_in", weights.W_in.dtype)
    checks.tensor("table", table, 2)
    steps = table.shape[0]
    checks.shaped("table", table, (steps, 5), x.device)
    checks.shaped("step_bias", step_bias, (steps, blocks, width), x.device)
    return _token_mlp_loop(x, weights, step_bias, table)
