"""Mean and spread of more samples than fit into memory."""

from __future__ import annotations

import torch


class Moments:
    """Count, mean and scatter (the summed squares of deviations) of samples that come in parts."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def merge(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Take in a part, given by its own moments (Chan et al. 1979)."""
        delta, total = mean - self.mean, self.count + count
        between = self._squared(delta) * (self.count * count / total)
        self.scatter = self.scatter + scatter + between
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @staticmethod
    def _squared(delta: torch.Tensor) -> torch.Tensor:
        return delta**2


class JointMoments(Moments):
    """The same of rows (n,D), whose scatter is a matrix (D,D); in float64."""

    def add(self, rows: torch.Tensor) -> None:
        """Take in rows (n,D)."""
        rows = rows.double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        self.merge(len(rows), mean, centred.T @ centred)

    @staticmethod
    def _squared(delta: torch.Tensor) -> torch.Tensor:
        return torch.outer(delta, delta)

    @property
    def covariance(self) -> torch.Tensor:
        """(D,D) float64."""
        return self.scatter / self.count
