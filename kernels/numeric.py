"""Arithmetic that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(x):
    """float64 as it is, everything narrower in float32: what the kernels compute in."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)
