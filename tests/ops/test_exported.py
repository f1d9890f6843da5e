"""What the reference is while a program is exported, against what it is otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffad_fast import reference, use_backend
from diffad_fast.denoisers.wavelet_unet import WaveletAttention
from diffad_fast.reference import exported

BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 6e-2}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_haar(level, dtype):
    x = random(2, 3, 16, 24, dtype=dtype)
    y = reference.haar_pack(x, level)
    close = {"rtol": 0, "atol": BOUNDS[dtype]}
    torch.testing.assert_close(exported.haar_pack(x, level), y, **close)
    torch.testing.assert_close(
        exported.haar_unpack(y, level), reference.haar_unpack(y, level), **close
    )


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("logit_gain", [False, True])
@pytest.mark.parametrize("value_gain", [False, True])
def test_attention(logit_gain, value_gain, dtype):
    q, k, v = (random(2, 3, 8, 12, 5, seed=s, dtype=dtype) for s in range(3))
    gains = [
        1 + random(3, 4, seed=s) if wanted else None
        for s, wanted in ((3, logit_gain), (4, value_gain))
    ]
    torch.testing.assert_close(
        exported.wavelet_attention(q, k, v, *gains, scale=0.3),
        reference.wavelet_attention(q, k, v, *gains, scale=0.3),
        rtol=0, atol=10 * BOUNDS[dtype],
    )  # fmt: skip


def traced(module, *shape):
    with use_backend("reference"), torch.no_grad():
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(
            module, (random(3, *shape, dtype=torch.float32),), dynamic_shapes=({0: batch},),
            strict=False,
        )  # fmt: skip
    return program.module(), len(program.graph.nodes)


class PackAndBack(nn.Module):
    def forward(self, x):
        return reference.haar_unpack(torch.tanh(reference.haar_pack(x, 2)), 2)


def test_exports_take_them():
    """Few nodes, which the time of an export goes with, and the same values for every batch."""
    attention = WaveletAttention(32).requires_grad_(False)
    nn.init.normal_(attention.projection.weight)
    for gain in (attention.logit_gain, attention.value_gain):
        nn.init.uniform_(gain)
    for module, shape, most in ((PackAndBack(), (4, 8, 16), 30), (attention, (32, 8, 12), 60)):
        program, nodes = traced(module, *shape)
        assert nodes <= most
        for n in (1, 5):
            x = random(n, *shape, seed=n, dtype=torch.float32)
            torch.testing.assert_close(program(x), module(x), rtol=1e-4, atol=1e-5)
