"""The denoiser as scoring runs it: its convolutions in bfloat16 where that is faster.

The convolutions take most of the U-Net's time. On a CPU those of 3x3 need a fourth of the
multiplications in float32 (``ops.conv3x3``), in bfloat16 the vendor's run at the rate of that:
which is faster depends on the processor. On a GPU bfloat16 halves the traffic of everything between
them too. Converted once, not at every call; the arithmetic of norms, embeddings and the state of
the reverse process stay in float32.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .. import native
from ..diffusion import graphs

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


def has_bfloat16(device: torch.device) -> bool:
    """Has ``device`` instructions for bfloat16? Without them it is far slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "avx512bf16" in native.cpu_features()


def faster_dtype(denoiser: nn.Module, x: torch.Tensor) -> str:
    """The dtype in which ``denoiser`` takes less time for inputs like ``x``.

    "float32" without a trial where there are no instructions for bfloat16.
    """
    if not has_bfloat16(x.device):
        return "float32"
    return "bfloat16" if _gain(denoiser, x) >= SMALLEST_GAIN else "float32"


@torch.inference_mode()
def _gain(denoiser: nn.Module, x: torch.Tensor, rounds: int = 7) -> float:
    """Time in float32 over time in bfloat16, the median of interleaved rounds."""
    level = torch.zeros(len(x), device=x.device)
    candidates = [in_dtype(denoiser, dtype) for dtype in ("float32", "bfloat16")]
    calls = [partial(_denoised, candidate, level) for candidate in candidates]
    if x.is_cuda:  # as scoring runs it: launches one by one would take longer than the work
        calls = [graphs.CapturedCall(call, x) for call in calls]
    elapsed = graphs.elapsed if x.is_cuda else _elapsed
    ratios = []
    for _ in range(rounds + 1):
        times = [elapsed(call, x) for call in calls]
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])  # the first round prepares


def _denoised(denoiser: nn.Module, level: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return denoiser(x, level)


def _elapsed(call: Callable, x: torch.Tensor) -> float:
    began = time.perf_counter()
    call(x)
    return time.perf_counter() - began
