"""Tensors as NumPy arrays, and arrays without a mask."""

from __future__ import annotations

import numpy as np
import torch

from .errors import InputError


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Without gradients and on the CPU; bfloat16, which NumPy has not, as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def check_unmasked(values, who: str, instead: str) -> None:
    """Raise InputError for an array of NumPy that has a mask on some of its values, which whoever
    reads it as an ordinary one would take. ``who`` has them; ``instead`` is what to do."""
    if np.ma.is_masked(values):
        raise InputError(f"{who} masked values: {instead}")
