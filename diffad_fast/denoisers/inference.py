"""The denoiser as scoring runs it: its convolutions in bfloat16 where that is faster.

On a CPU the convolutions take most of the U-Net's time. In float32 those of 3x3 need a fourth of
the multiplications (``ops.conv3x3``), in bfloat16 the vendor's run at the rate of that: which is
faster depends on the processor. Converted once, not at every call; norms, embeddings and the state
of the reverse process stay in float32.
"""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import nn

from .. import native

SMALLEST_GAIN = 1.1  # times faster; below that the bits are worth more


def in_dtype(denoiser: nn.Module, dtype: str) -> nn.Module:
    """``denoiser`` itself for "float32"; for "bfloat16" a copy with its convolutions in that."""
    if dtype != "bfloat16":
        return denoiser
    copied = copy.deepcopy(denoiser)
    for module in copied.modules():
        if isinstance(module, nn.Conv2d):
            module.to(torch.bfloat16)
    return copied


def faster_dtype(denoiser: nn.Module, x: torch.Tensor) -> str:
    """The dtype in which ``denoiser`` takes less time for inputs like ``x``.

    "float32" without a trial where the processor has no instructions for bfloat16, and on other
    devices than the CPU.
    """
    if x.device.type != "cpu" or "avx512bf16" not in native.cpu_features():
        return "float32"
    return "bfloat16" if _gain(denoiser, x) >= SMALLEST_GAIN else "float32"


@torch.inference_mode()
def _gain(denoiser: nn.Module, x: torch.Tensor, rounds: int = 7) -> float:
    """Time in float32 over time in bfloat16, the median of interleaved rounds."""
    level = torch.zeros(len(x))
    ratios = []
    candidates = [in_dtype(denoiser, dtype) for dtype in ("float32", "bfloat16")]
    for _ in range(rounds + 1):
        times = []
        for candidate in candidates:
            began = time.perf_counter()
            candidate(x, level)
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])  # the first round prepares
