"""Tensors as NumPy arrays."""

from __future__ import annotations

import numpy as np
import torch


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Without gradients and on the CPU; bfloat16, which NumPy has not, as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
