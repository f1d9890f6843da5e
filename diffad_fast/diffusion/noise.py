"""Noise that is the same for every sample, so that a result does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from .. import ops


class NoiseFields:
    """Fields of ``ops.philox_normal`` by their shape, each made once: a captured graph reads it
    where it is, and in an exported program it is a constant."""

    def __init__(self, seed: int):
        self.seed = seed
        self._made: dict[Hashable, torch.Tensor] = {}

    def __call__(self, shape: tuple[int, ...], device: torch.device, step: int = 0) -> torch.Tensor:
        # Backends differ by rounding.
        key = step, shape, device, ops.dispatch.selected()
        if key not in self._made:
            with torch.inference_mode(False):
                self._made[key] = ops.philox_normal(shape, self.seed, step=step, device=device)
        return self._made[key]
