"""The answer of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Score:
    """What a detector says of N images.

    score (N,) float64, higher is more anomalous; map (N,H,W) float32 at the detector's
    image_size, or None when no maps were asked for; p_value (N,) float64, the share of normals
    expected to score as high; label (N,) int64, 1 for an anomaly, or None when too few normals
    were held out; paths: the files, or None for arrays; index (N,) int64: position in the source;
    skipped: (file, reason) of files that could not be used.
    """

    score: np.ndarray
    map: np.ndarray | None
    p_value: np.ndarray
    label: np.ndarray | None
    paths: list[str] | None
    index: np.ndarray
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.score)

    def take(self, rows: Sequence[int]) -> Score:
        """The same answer for some of the images."""
        return Score(
            score=self.score[rows],
            map=None if self.map is None else self.map[rows],
            p_value=self.p_value[rows],
            label=None if self.label is None else self.label[rows],
            paths=None if self.paths is None else [self.paths[i] for i in rows],
            index=self.index[rows],
        )

    @staticmethod
    def join(parts: Sequence[Score]) -> Score:
        """One answer from those of successive batches (at least one)."""
        skipped = [entry for part in parts for entry in part.skipped]
        parts = [part for part in parts if len(part)] or list(parts[:1])
        first = parts[0]
        return Score(
            score=np.concatenate([p.score for p in parts]),
            map=None if first.map is None else np.concatenate([p.map for p in parts]),
            p_value=np.concatenate([p.p_value for p in parts]),
            label=None if first.label is None else np.concatenate([p.label for p in parts]),
            paths=None if first.paths is None else [path for p in parts for path in p.paths],
            index=np.concatenate([p.index for p in parts]),
            skipped=skipped,
        )
