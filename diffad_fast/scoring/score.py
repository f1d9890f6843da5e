"""The answer of a detector."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Score:
    """What a detector says of N samples.

    score (N,) float64, higher is more anomalous; map (N,H,W) float32 at the detector's image_size
    (with ``overlap`` of the image's own size, NaN below and to the right of smaller images), or
    None for vectors and when no maps were asked for; for audio (N,n_mels,steps), a column for every
    ``window_step`` frames, NaN after the end of clips that are shorter than others, and the sum of
    a column, map.sum(axis=1), is the score over time (``Detector.frequencies`` and
    ``Detector.times`` tell Hz and seconds); p_value (N,) float64, the share of normals
    expected to score as high; label (N,) int64, 1 for an anomaly, or None when too few groups of
    normals were held out, fewer than 20 or than 1/false_positive_rate - 1; paths: the files, or
    None for arrays; index (N,) int64: position in the source; skipped: (file, reason) of files that
    could not be used.
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
    def join(parts: Iterable[Score]) -> Score:
        """One answer from those of successive batches, which are read once.

        Numbers are gathered in one piece each: thousands of small arrays that outlive the large
        temporary tensors allocated around them would keep the freed memory between them from being
        used again, and the process would grow with the data.
        """
        columns = {name: array("d") for name in ("score", "p_value")}
        columns |= {name: array("q") for name in ("label", "index")}
        maps: list[np.ndarray] = []
        paths: list[str] = []
        skipped: list[tuple[str, str]] = []
        missing = set()
        for part in parts:
            skipped += part.skipped
            if not len(part):
                continue
            for name, column in columns.items():
                values = getattr(part, name)
                missing |= {name} if values is None else set()
                column.extend([] if values is None else values.tolist())
            missing |= {name for name in ("map", "paths") if getattr(part, name) is None}
            # A copy: a GPU's maps come in page-locked memory, and one piece serves all batches.
            maps += [] if part.map is None else [part.map.copy()]
            paths += part.paths or []
        return Score(
            score=np.array(columns["score"]),
            map=None if "map" in missing else _concatenated(maps),
            p_value=np.array(columns["p_value"]),
            label=None if "label" in missing else np.array(columns["label"]),
            paths=None if "paths" in missing else paths,
            index=np.array(columns["index"]),
            skipped=skipped,
        )


def _concatenated(maps: list[np.ndarray]) -> np.ndarray:
    """Smaller maps are filled up with NaN, below and to the right."""
    if len(maps) == 1:
        return maps[0]
    height, width = (max(map_.shape[axis] for map_ in maps) for axis in (1, 2))
    if all(map_.shape[1:] == (height, width) for map_ in maps):
        return np.concatenate(maps)
    padded = [((0, 0), (0, height - m.shape[1]), (0, width - m.shape[2])) for m in maps]
    return np.concatenate(
        [np.pad(m, pad, constant_values=np.nan) for m, pad in zip(maps, padded, strict=True)]
    )


def own_part(map_: np.ndarray) -> np.ndarray:
    """A map (H,W) of a :class:`Score` without the NaN that fills it up to the largest."""
    known = np.isfinite(map_)
    return map_[: known[:, 0].sum(), : known[0].sum()]
