"""AdamW, gradient clipping and the moving average of the weights, on one flat buffer."""

from __future__ import annotations

import json

import torch
from torch import nn

from ..config import DetectorConfig
from ..errors import InputError

# What is kept of a training on disk, each a vector of all parameters.
STATE = ("values", "average", "first", "second")


class Optimizer:
    """Updates all parameters of a module that require gradients.

    From here until :meth:`release` each parameter and its gradient are views of two vectors,
    ``values`` and ``gradient``: clipping, AdamW, the average and the exchange between processes
    are one operation each, however many parameters there are. Three numbers more, ``extra``,
    follow the gradient in ``shared``, for what else processes exchange in a step.

    Gradients are clipped to the norm ``gradient_clip``. The average keeps
    min(ema_decay, (1 + k)/(10 + k)) of itself at update number k, so that the first, random
    parameters are soon forgotten.

    Raises InputError for parameters of several types or devices.
    """

    def __init__(self, module: nn.Module, config: DetectorConfig):
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        kinds = {(p.dtype, p.device) for _, p in named}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
            raise InputError(
                f"the denoiser's trainable parameters are {found}: they must be of one type and on "
                "one device"
            )
        ((dtype, device),) = kinds
        self.config, self.parameters = config, [p for _, p in named]
        # Two states belong together if their vectors mean the same.
        self.layout = json.dumps([[n, list(p.shape), list(p.stride())] for n, p in named])
        total = sum(p.numel() for p in self.parameters)
        self.values = torch.empty(total, dtype=dtype, device=device)
        self.shared = torch.zeros(total + 3, dtype=dtype, device=device)
        self.gradient, self.extra = self.shared[:total], self.shared[total:]
        with torch.no_grad():
            for view, gradient, p in zip(
                self._views(self.values), self._views(self.gradient), self.parameters, strict=True
            ):
                view.copy_(p)
                p.data, p.grad = view, gradient
        self.average = self.values.clone()
        self.first, self.second = torch.zeros_like(self.values), torch.zeros_like(self.values)
        # On the device, so that a captured step reads what they are at its replay.
        self.rate = torch.zeros((), device=device)
        self.share = torch.zeros((), dtype=dtype, device=device)
        self._count = torch.zeros((), device=device)

    def _views(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a vector in the shapes, and memory layouts, of the parameters."""
        views, offset = [], 0
        for p in self.parameters:
            # as_strided keeps channels_last; a parameter with gaps or overlaps becomes contiguous.
            dense = p.is_contiguous() or _channels_last(p)
            part = vector[offset : offset + p.numel()]
            views.append(part.as_strided(p.shape, p.stride(), offset) if dense else part.view_as(p))
            offset += p.numel()
        return views

    def set(self, step: int, learning_rate: float) -> None:
        """The numbers of update number ``step`` (from 0)."""
        self.rate.fill_(learning_rate)
        self.share.fill_(1 - min(self.config.ema_decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Take a step along ``gradient``. The host waits for nothing."""
        limit = self.config.gradient_clip
        if limit:
            norm = torch.linalg.vector_norm(self.gradient)
            self.gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        self._count.add_(1)
        # What torch.optim.AdamW(fused=True) calls, whose first step imports torch's compiler: that
        # takes longer than many a training here.
        torch._fused_adamw_(
            [self.values], [self.gradient], [self.first], [self.second], [], [self._count],
            lr=self.rate, beta1=0.9, beta2=0.999, eps=1e-8,
            weight_decay=self.config.weight_decay, amsgrad=False, maximize=False,
        )  # fmt: skip
        self.average.lerp_(self.values, self.share)
        self._changed()

    def exchange(self, other: torch.Tensor) -> None:
        """Swap the parameters with another vector of all of them, in place."""
        kept = self.values.clone()
        self.values.copy_(other)
        other.copy_(kept)
        self._changed()

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Take over the vectors named in STATE, after ``step`` updates."""
        for name in STATE:
            getattr(self, name).copy_(tensors[name])
        self._count.fill_(float(step))
        self._changed()

    def _changed(self) -> None:
        """Tell who keeps something made from a parameter: its own version does not count what is
        written to the vector that it is a view of."""
        torch.autograd.graph.increment_version(self.parameters)

    def release(self) -> None:
        """Give every parameter memory of its own again, and drop the gradients."""
        for p in self.parameters:
            p.data, p.grad = p.data.clone(), None


def _channels_last(p: torch.Tensor) -> bool:
    return p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
