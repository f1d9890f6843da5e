"""Group normalisation with modulation and activation."""

from __future__ import annotations

import torch

from .. import native, reference
from . import checks
from .dispatch import Operator, kernel
from .layout import empty_4d


class _GroupNormSiLU(torch.autograd.Function):
    """The native operator with its gradient.

    Not ``torch.library.register_autograd``, whose Python kernel takes longer than the operator
    itself on the small tensors of a U-Net's coarse levels, also where no gradient is wanted.
    """

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, scale, shift, activation):
        y, stats = torch.ops.diffad_fast.group_norm_silu.default(
            x, groups, weight, bias, eps, scale, shift, activation
        )
        ctx.groups, ctx.activation = groups, activation
        ctx.save_for_backward(x, stats, weight, bias, scale, shift)
        return y

    @staticmethod
    def backward(ctx, grad):
        checks.differentiated_once("group_norm_silu")
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 5, 6)]
        x, stats, *parameters = ctx.saved_tensors
        found = torch.ops.diffad_fast.group_norm_silu_backward.default(
            grad,
            x,
            stats,
            ctx.groups,
            *parameters,
            ctx.activation,
            sum(need << bit for bit, need in enumerate(wanted)),
        )
        dx, dweight, dbias, dscale, dshift = (
            g if need else None for g, need in zip(found, wanted, strict=True)
        )
        return dx, None, dweight, dbias, None, dscale, dshift, None


def _native(x, groups, weight, bias, eps, scale, shift, activation):
    arguments = (x, groups, weight, bias, eps, scale, shift, activation)
    if torch.is_grad_enabled() and any(
        p is not None and p.requires_grad for p in (x, weight, bias, scale, shift)
    ):
        return _GroupNormSiLU.apply(*arguments)
    return torch.ops.diffad_fast.group_norm_silu.default(*arguments)[0]


_group_norm_silu = Operator(
    "group_norm_silu",
    reference.group_norm_silu,
    triton=kernel("group_norm_silu", "group_norm_silu"),
    **dict.fromkeys(native.implementations("group_norm_silu"), _native),
)


def group_norm_silu(
    x, num_groups, weight=None, bias=None, eps=1e-5, scale=None, shift=None, activation=True
):
    """``silu(GroupNorm(x) * (1 + scale) + shift)``, without the silu if not ``activation``.

    x: (N,C,H,W), C divisible by ``num_groups``; weight, bias: (C,); scale, shift: (N,C), each
    optional. Returns the shape, dtype and memory format (channels_last included) of ``x``.
    Differentiable in all tensors (natively once). Mean and variance are taken in float32
    (float64 for float64) about the mean, never as E[x^2] - E[x]^2.

    Raises TypeError for dtypes, ValueError for shapes, devices, ``num_groups`` and ``eps``.
    Source: Wu & He 2018; the modulation is that of Dhariwal & Nichol 2021.
    """
    checks.tensor("x", x, 4)
    n, c = x.shape[:2]
    num_groups = checks.integer("num_groups", num_groups, 1, max(c, 1))
    if c % num_groups:
        raise ValueError(f"{c} channels do not divide into num_groups = {num_groups}")
    for name, y, shape in (
        ("weight", weight, (c,)),
        ("bias", bias, (c,)),
        ("scale", scale, (n, c)),
        ("shift", shift, (n, c)),
    ):
        if y is not None:
            checks.shaped(name, y, shape, x.device)
    eps = checks.number("eps", eps, 0.0)
    return _group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, activation)


def _fake(x, num_groups, weight, bias, eps, scale, shift, activation):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return empty_4d(x, x.shape), x.new_empty(x.shape[0], num_groups, 2, dtype=dtype)


def _fake_backward(grad, x, stats, groups, weight, bias, scale, shift, activation, needs):
    parameters = (weight, bias, scale, shift)
    return (
        empty_4d(x, x.shape) if needs & 1 else x.new_empty(0),
        *(
            (x if p is None else p).new_empty(p.shape if needs >> bit & 1 else 0)
            for bit, p in enumerate(parameters, 1)
        ),
    )


if native.loaded():
    torch.library.register_fake("diffad_fast::group_norm_silu", _fake)
    torch.library.register_fake("diffad_fast::group_norm_silu_backward", _fake_backward)
