"""A whole loop of evaluations of the token MLP in one call."""

from __future__ import annotations

import torch

from .. import native, reference
from ..reference import PackedTokenMLP
from . import checks
from .dispatch import Operator, takes_cpp

__all__ = ["PackedTokenMLP", "token_mlp_loop"]


CUDA_WIDTHS = (128, 256)


def _native(operator):
    """The operator with its weights as one argument."""
    return lambda x, weights, step_bias, table: operator(x, *weights, step_bias, table)


def _cuda_refuses(x, weights, *_):
    if weights.W_in.dtype != torch.bfloat16 or weights.W_in.shape[0] not in CUDA_WIDTHS:
        return (
            f"the CUDA kernel takes bfloat16 weights of width {' and '.join(map(str, CUDA_WIDTHS))}"
            f", not {weights.W_in.dtype} of width {weights.W_in.shape[0]}"
        )
    return "the CUDA kernel computes in float32, not float64" if x.dtype == torch.float64 else None


_token_mlp_loop = Operator(
    "token_mlp_loop",
    reference.token_mlp_loop,
    **{k: _native(f) for k, f in native.implementations("token_mlp_loop").items()},
    refuses={"cuda": _cuda_refuses},
)


def token_mlp_loop(x, weights, step_bias, table):
    """Run S affine steps x <- A x + Bm m(x) of the token MLP m: a reverse process, an inversion,
    or (A = 1, Bm = 0) parallel evaluations of the same x.

    x: (M,D) tokens. weights: :class:`PackedTokenMLP` for D, of width W with B blocks, in
    bfloat16, float16, float32 or float64. step_bias: (S,B,W), per step and block the embedding of
    the time plus the bias that ``PackedTokenMLP.pack`` returns. table: (S,5), a row a step:
    (c_in, A, Bm, p, q). Every unclipped DDIM step with eta = 0 has this form.

    Returns x_end (M,D) in the dtype of ``x`` and stats (M,S) in float32 (float64 for float64 x):
    the mean over D of (p x + q m)^2 with the x before the step's update. The state is kept in
    float32 at least, the inputs of matrix products are rounded to the dtype of the weights; the
    equations are in ``reference.token_mlp_loop``.

    The native backends keep tokens on the chip through all layers and steps. What they compute
    for a token does not depend on the other tokens. Differentiable in all tensors, once: the
    backward pass evaluates the reference again, with its graph.

    On a CPU, bfloat16 weights are multiplied by AMX or by AVX-512's dot products where the
    processor has them, else widened; :func:`laid_out` saves each call a copy, which for a few
    tokens takes longer than the rest. On a GPU, one kernel serves bfloat16 weights of width 128 and
    256, any D and blocks; ``auto`` serves the rest by the reference, and a backend ``cuda`` that
    was asked for by name refuses it.

    Raises TypeError for dtypes, ValueError for shapes and devices, BackendError for weights that a
    backend asked for by name does not serve.
    """
    checks.tensor("x", x, 2)
    cpp = _token_mlp_loop.implementations.get("cpu")
    if cpp and takes_cpp(x) and type(x) is torch.Tensor and type(weights) is PackedTokenMLP:
        # It checks its arguments itself: for one token, doing so here would take half of the time.
        # What is wrong is found out afterwards.
        try:
            return cpp(x, weights, step_bias, table)
        except (RuntimeError, TypeError):
            _check(x, weights, step_bias, table)
            raise
    _check(x, weights, step_bias, table)
    return _token_mlp_loop(x, weights, step_bias, table)


def laid_out(weights: PackedTokenMLP) -> PackedTokenMLP:
    """The same weights, lying in memory as :func:`token_mlp_loop` reads them, which else copies
    them at each call: on a CPU matrices column by column, but those of bfloat16 row by row where
    AMX multiplies them. What it has to widen, as float16, it copies all the same."""
    by_rows = weights.W_in.dtype == torch.bfloat16 and native.cpu_isa() == "amx"
    if weights.W_in.device.type != "cpu" or by_rows:
        return weights
    matrices = {name: getattr(weights, name) for name in ("W_in", "W1", "W2", "W_out")}
    return weights._replace(**{k: w.mT.contiguous().mT for k, w in matrices.items()})


def _weight_shapes(x, weights, levels):
    d = x.shape[1]
    width, blocks = weights.W_in.shape[0], weights.W1.shape[0]
    return (
        (width, d),
        (width,),
        (blocks, width, width),
        (blocks, width, width),
        (blocks, width),
        (d, width),
        (d,),
        (levels, blocks, width),
    )


def _check(x, weights, step_bias, table):
    """Raise what is wrong with the arguments, if anything."""
    checks.tensor("x", x, 2)
    checks.tensor("table", table, 2)
    checks.shaped("table", table, (len(table), 5), x.device)
    check_weights(x, weights, step_bias, len(table))


def check_weights(x, weights, step_bias, levels):
    """Raise what is wrong with a token MLP's weights, or its biases at so many levels, for x."""
    if not isinstance(weights, PackedTokenMLP):
        raise TypeError(f"weights must be a PackedTokenMLP, got {type(weights).__name__}")
    checks.tensor("W_in", weights.W_in, 2)
    checks.tensor("W1", weights.W1, 3)
    *shapes, bias_shape = _weight_shapes(x, weights, levels)
    for name, tensor, shape in zip(PackedTokenMLP._fields, weights, shapes, strict=True):
        checks.shaped(name, tensor, shape, x.device)
        checks.same_dtype(name, tensor, "W_in", weights.W_in.dtype)
    checks.shaped("step_bias", step_bias, bias_shape, x.device)


def _fake(x, W_in, b_in, W1, W2, b2, W_out, b_out, step_bias, table):
    stats = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((x.shape[0], table.shape[0]), dtype=stats)


def _fake_backward(grad_x, grad_stats, inputs):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


def _backward_op(grad_x, grad_stats, inputs):
    """Gradients for all inputs of the operator, by the graph of the reference."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    x, *weights, step_bias, table = leaves
    with torch.enable_grad():
        outputs = reference.token_mlp_loop(x, PackedTokenMLP(*weights), step_bias, table)
    # Without a step the statistics are of nothing.
    pairs = zip(outputs, (grad_x, grad_stats), strict=True)
    outputs, grads = zip(*[(y, grad) for y, grad in pairs if y.requires_grad], strict=True)
    grads = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
    return [g.contiguous() for g in grads]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_x, grad_stats):
    checks.differentiated_once("token_mlp_loop")
    return tuple(
        torch.ops.diffad_fast.token_mlp_loop_backward(grad_x, grad_stats, ctx.saved_tensors)
    )


if native.loaded():
    torch.library.register_fake("diffad_fast::token_mlp_loop", _fake)
    torch.library.register_autograd("diffad_fast::token_mlp_loop", _backward, setup_context=_save)
    torch.library.impl(
        "diffad_fast::token_mlp_loop_backward", "CompositeExplicitAutograd", _backward_op
    )
    torch.library.register_fake("diffad_fast::token_mlp_loop_backward", _fake_backward)
