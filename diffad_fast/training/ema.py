"""Exponential moving average of a module's parameters."""

from __future__ import annotations

import torch
from torch import nn


class EMA:
    """Keeps ``decay`` of the average and adds the rest of the current parameters at each update.

    The decay grows as (1 + k)/(10 + k) until it reaches ``decay``, so that the first, random
    parameters are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        self.average = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters after update number ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, list(module.parameters()), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the average in the place of the module's parameters."""
        torch._foreach_copy_(list(module.parameters()), self.average)
