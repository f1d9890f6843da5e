"""The denoising loss of the token MLP with all its gradients in one call."""

from __future__ import annotations

import torch

from .. import native, reference
from . import checks
from .dispatch import Operator
from .token_mlp import check_weights

__all__ = ["token_mlp_loss"]

WIDTH_STEP = 16  # kWidthStep of csrc/cpu/kernels/token_mlp_loss.h


def _call(x, target, weight, step_bias, weights, gradients):
    return torch.ops.diffad_fast.token_mlp_loss(
        x.contiguous(), target.contiguous(), weight.contiguous(),
        [w.contiguous() for w in weights], step_bias.contiguous(), gradients,
    )  # fmt: skip


class _Loss(torch.autograd.Function):
    """The operator computes its gradients beside the loss, while activations lie in the cache."""

    @staticmethod
    def forward(ctx, x, target, weight, step_bias, *weights):
        wanted = any(ctx.needs_input_grad)
        loss, gradients = _call(x, target, weight, step_bias, weights, wanted)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad):
        checks.differentiated_once("token_mlp_loss")
        gradients = ctx.saved_tensors
        # A loss that is what is differentiated; reading a number waits for nothing on a CPU, but
        # torch.compile cannot.
        if torch.compiler.is_compiling() or float(grad) != 1.0:
            gradients = [g * grad for g in gradients]
        *weights, step_bias = gradients
        return None, None, None, step_bias, *weights


def _native(x, target, weight, weights, step_bias):
    if not torch.is_grad_enabled():  # of which a Function's forward pass knows nothing
        return _call(x, target, weight, step_bias, weights, False)[0]
    return _Loss.apply(x, target, weight, step_bias, *weights)


def _refuses(x, target, weight, weights, step_bias):
    tensors = (x, target, weight, *weights, step_bias)
    if any(t.dtype != torch.float32 for t in tensors):
        return "it is written for float32"
    if weights.W_in.shape[0] % WIDTH_STEP or 0 in (len(weights.W1), x.shape[1]):
        return f"it is written for widths that are multiples of {WIDTH_STEP}, and at least a block"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, target, weight)):
        return "it has no gradients for x, target and weight"
    return None


_token_mlp_loss = Operator(
    "token_mlp_loss",
    reference.token_mlp_loss,
    **dict.fromkeys(native.implementations("token_mlp_loss"), _native),
    refuses={"cpu": _refuses},
)


def token_mlp_loss(x, target, weight, weights, step_bias):
    """Weighted squared error of the token MLP's prediction, for training it.

    x, target: (M,D), network inputs and what the network shall say of them. weight: (M,).
    weights: :class:`PackedTokenMLP` for D, of width W with B blocks. step_bias: (S,B,W) for S
    levels, as for :func:`token_mlp_loop`; M must be a positive multiple of S, and tokens
    s M/S to (s + 1) M/S - 1 are at level s: the embedding of a level is computed once, not for
    every token.

    Returns a scalar, float32 at least: the mean over tokens of ``weight`` times the mean squared
    error. Differentiable, once, in the weights and ``step_bias``; the reference also in the rest.
    The CPU backend serves float32 with W a multiple of 16 and computes the gradients along with
    the loss, so that the backward pass itself costs nothing.

    Raises TypeError for dtypes, ValueError for shapes and devices, BackendError for what a backend
    asked for by name does not serve.
    """
    checks.tensor("x", x, 2)
    checks.shaped("target", target, x.shape, x.device)
    checks.shaped("weight", weight, x.shape[:1], x.device)
    checks.tensor("step_bias", step_bias, 3)
    check_weights(x, weights, step_bias, len(step_bias))
    if not len(x) or not len(step_bias) or len(x) % len(step_bias):
        raise ValueError(
            f"x has {len(x)} tokens and step_bias {len(step_bias)} levels: the tokens must be a "
            "positive multiple of the levels"
        )
    return _token_mlp_loss(x, target, weight, weights, step_bias)


def _fake(x, target, weight, weights, step_bias, gradients):
    grads = [torch.empty_like(w) for w in (*weights, step_bias)] if gradients else []
    return x.new_empty(()), grads


if native.loaded():
    torch.library.register_fake("diffad_fast::token_mlp_loss", _fake)
