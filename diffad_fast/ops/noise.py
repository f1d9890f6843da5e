"""Noise that depends on its key and position alone."""

from __future__ import annotations

import math

import torch

from .. import native, reference
from . import checks
from .dispatch import Operator


def _native_philox_normal(shape, seed, draw, step, device):
    """The operator fills a tensor, whose device chooses the implementation."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    keys = [
        (0, x.to(out.device)) if isinstance(x, torch.Tensor) else (x, None) for x in (draw, step)
    ]
    (draw, draws), (step, steps) = keys
    torch.ops.diffad_fast.philox_normal_(out, seed, draw, step, draws, steps)
    return out


_philox_normal = Operator(
    "philox_normal",
    reference.philox_normal,
    **dict.fromkeys(native.implementations("philox_normal_"), _native_philox_normal),
)

# The counter holds draw in 64 bits, step and the index of a block of four elements in 32.
LARGEST_KEY = 2**63 - 1
LARGEST_STEP = 2**32 - 1
LARGEST_FIELD = 4 * 2**32


def philox_normal(shape, seed, draw=0, step=0, device=None):
    """Standard normal noise (float32) that is a function of (seed, draw, step) and position.

    shape: a tuple of integers. seed, draw: integers in [0, 2^63); step: an integer in [0, 2^32).
    ``draw`` and ``step`` may also be int64 tensors of shape (shape[0],), whose values are not
    checked: then each leading index n is a field of its own, so that
    ``philox_normal((N, *s), seed, draw=t)[n]`` equals ``philox_normal(s, seed, draw=int(t[n]))``.
    A field has at most 2^34 elements. ``device`` defaults to that of the tensors, else to
    torch's default; tensors elsewhere are moved there.

    The same arguments give the same numbers on one device, bit for bit, whatever was drawn
    before; devices and backends may differ by rounding. Philox4x32-10 (Salmon et al. 2011) and
    Box-Muller, |z| <= 6.66; the counter's layout is in ``reference.philox_normal``.

    Raises TypeError for types, ValueError for values and shapes.
    """
    shape = tuple(checks.integer("every entry of shape", n, 0, LARGEST_KEY) for n in shape)
    seed = checks.integer("seed", seed, 0, LARGEST_KEY)
    draw = _check_key("draw", draw, LARGEST_KEY, shape)
    step = _check_key("step", step, LARGEST_STEP, shape)
    tensors = [x for x in (draw, step) if isinstance(x, torch.Tensor)]
    if math.prod(shape[1:] if tensors else shape) > LARGEST_FIELD:
        raise ValueError(f"a field of shape {shape} has more than 2^34 elements: draw it in parts")
    if device is None:
        device = tensors[0].device if tensors else torch.empty(0).device
    if not isinstance(device, torch.device):
        device = torch.device(device)
    return _philox_normal.on(device)(shape, seed, draw, step, device)


def _check_key(name, value, largest, shape):
    if not isinstance(value, torch.Tensor):
        return checks.integer(name, value, 0, largest)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be an integer or an int64 tensor, got {value.dtype}")
    if not shape or tuple(value.shape) != shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: for noise of shape {shape} it must be an "
            f"integer or have one entry per leading index"
        )
    return value


if native.loaded():

    @torch.library.register_fake("diffad_fast::philox_normal_")
    def _fake(out, *_):
        pass
