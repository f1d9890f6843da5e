"""How Triton operators are registered: what torch.compile and the compilers get to see."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffad_fast.ops import dispatch

pytestmark = pytest.mark.skipif(
    "triton" in dispatch.unavailable(), reason=dispatch.unavailable().get("triton", "")
)
ROOT = Path(__file__).parents[2]
# What a GPU is asked for is given by hand: traced and compiled without one.
PREAMBLE = "import torch, triton, diffad_fast.kernels.wavelet_attention as wa\n"


def run(code: str) -> str:
    """Output of ``code`` in a process where kernels are compiled, not interpreted."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_torch_compile_sees_the_kernels():
    code = """
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
wa.capability = lambda device: 90

def kernels(function, *args):
    code = make_fx(dispatch_functionalize(function))(*args).code
    print(code.count("triton_kernel_wrapper_functional("))

with FakeTensorMode():
    x = torch.empty(2, 8, 8, 4, 32).permute(0, 3, 1, 2, 4)
    for gain in ([torch.empty(4, 4)], []):
        def forward(q, *g):
            g = g[0] if g else None
            return wa.wavelet_attention_forward(q, q, q, g, g, 1, 0.1, True)
        def backward(q, u, lse, *g):
            g = g[0] if g else None
            return wa.wavelet_attention_backward(u, q, q, q, u, lse, g, g, 1, 0.1)
        kernels(forward, x, *gain)
        out, mixed, lse = forward(x, *gain)
        kernels(backward, x, out, lse, *gain)
"""
    assert run(code).split() == ["1", "2", "1", "2"]


def test_configurations():
    """Few, and every BLOCK_M holds whole groups of partial sums."""
    from diffad_fast.kernels import wavelet_attention as wa

    sizes = itertools.product(
        (80, 86, 90, 100, 120), wa.TILES, (torch.bfloat16, torch.float32), (16, 64, 128, 256, 512)
    )
    for capability, kernel, dtype, channels in sizes:
        found = wa.configurations(kernel, channels, dtype, capability)
        assert 1 <= len(found) <= 4
        for c in found:
            m, n = c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"]
            assert m % 16 == 0 and n % 16 == 0 and c.num_warps in (4, 8), c


@pytest.mark.slow
@pytest.mark.parametrize("capability, instruction", [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_kernels_compile_to_matrix_instructions(capability, instruction):
    code = f"""
from triton.backends.compiler import GPUTarget
make = wa.COMPILE["forward, level 1, d 64, bf16"]
source, options = make({capability})
done = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=options)
print(done.asm["ptx"].count("{instruction}"), done.metadata.shared)
"""
    count, shared = map(int, run(code).split())
    assert count >= 16 and shared <= {80: 163, 90: 227}[capability] << 10
