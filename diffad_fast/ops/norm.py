"""Group normalisation with modulation and activation."""

from __future__ import annotations

from .. import reference
from . import checks
from .dispatch import Operator


def _triton(*arguments):
    from ..kernels.group_norm_silu import group_norm_silu

    return group_norm_silu(*arguments)


_group_norm_silu = Operator("group_norm_silu", reference.group_norm_silu, triton=_triton)


def group_norm_silu(
    x, num_groups, weight=None, bias=None, eps=1e-5, scale=None, shift=None, activation=True
):
    """``silu(GroupNorm(x) * (1 + scale) + shift)``, without the silu if not ``activation``.

    x: (N,C,H,W), C divisible by ``num_groups``; weight, bias: (C,); scale, shift: (N,C), each
    optional. Returns the shape, dtype and memory format (channels_last included) of ``x``.
    Differentiable in all tensors.

    Raises TypeError for dtypes, ValueError for shapes, devices, ``num_groups`` and ``eps``.
    Source: Wu & He 2018; the modulation is that of Dhariwal & Nichol 2021.
    """
    checks.tensor("x", x, 4)
    n, c = x.shape[:2]
    checks.integer("num_groups", num_groups, 1, max(c, 1))
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
    checks.number("eps", eps, 0.0)
    return _group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, activation)
