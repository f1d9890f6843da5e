"""Tables and embeddings: one vector, one token."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from .moments import Moments

# From this many features on a vector is taken for an embedding, whose features share a unit.
EMBEDDING_FEATURES = 256


class VectorTokens(nn.Module):
    """Vectors (N,D) to one grid of one standardised token, (N,1,1,D).

    scale: "feature" divides every feature by its own deviation on normal data, "global" all by the
    root of their mean variance; "auto" takes "global" from 256 features on. A feature that never
    varies among normals has no unit of its own: "feature" divides it by 1, whatever the others are
    measured in, so what it does in new data still counts.
    """

    def __init__(self, scale: str = "auto"):
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.zeros(0))
        self.register_buffer("deviation", torch.zeros(0))

    @property
    def dims(self) -> list[int]:
        """The size of the tokens, after ``fit``."""
        return [len(self.mean)]

    @property
    def by_one_scale(self) -> bool:
        """Is every feature divided by the same number?"""
        return (
            self.scale == "global" or self.scale == "auto" and len(self.mean) >= EMBEDDING_FEATURES
        )

    @torch.no_grad()
    def fit(
        self,
        batches: Callable[[], Iterable[torch.Tensor]],
        every: Callable[[], Iterable[torch.Tensor]] | None = None,
    ) -> None:
        """Set mean and deviation; ``batches()`` iterates over normal vectors (n,D).

        every: the same over more of them, of which ``batches`` are a part: by these "feature"
        judges what does not vary in that part.
        """
        rows = torch.cat([batch.double() for batch in batches()])
        self.mean = rows.mean(dim=0).float()
        variance = rows.var(dim=0, correction=0)
        deviation = variance.sqrt()
        if self.by_one_scale:
            overall = variance.mean().sqrt().clamp(min=1e-12)
            self.deviation = overall.float().repeat(len(deviation))
            return
        varies = _varies(deviation, rows.abs().amax(dim=0))
        self.deviation = torch.where(varies, deviation, 1.0).float()
        if every is not None and not varies.all():
            self._fit_rare(every(), (~varies).nonzero()[:, 0])

    def _fit_rare(self, batches: Iterable[torch.Tensor], features: torch.Tensor) -> None:
        """Set mean and deviation of those of these features that vary in vectors (n,D)."""
        moments, largest = Moments(), 0.0
        for batch in batches:
            rows = batch[:, features].double()
            mean = rows.mean(dim=0)
            moments.merge(len(rows), mean, (rows - mean).square().sum(dim=0))
            largest = rows.abs().amax(dim=0).clamp(min=largest)
        deviation = (moments.scatter / moments.count).sqrt()
        varies = _varies(deviation, largest)
        self.mean[features[varies]] = moments.mean[varies].float()
        self.deviation[features[varies]] = deviation[varies].float()

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The grid of vectors."""
        return [((x - self.mean) / self.deviation)[:, None, None]]


def _varies(deviation: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Is it more than rounding? That leaves a constant feature a deviation of some 1e-16 of its
    size."""
    return deviation > 1e-6 * largest
