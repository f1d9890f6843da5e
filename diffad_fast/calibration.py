"""Calibrating a detector: which normals are held out, and what they look like in a mode."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from . import models
from .config import DetectorConfig
from .errors import InputError
from .models.fusion import top_mean
from .progress import progress
from .scoring import (
    SMALLEST_CALIBRATION,
    Conformal,
    MapStatistics,
    Split,
    cross_splits,
    fit_statistics,
    split_by_group,
)

# Of a cross-fitted calibration, unless told otherwise: each model sees four fifths of the normals.
FOLDS = 5


class Calibration(NamedTuple):
    """What held-out normals look like in one mode."""

    statistics: list[MapStatistics | None]
    conformal: Conformal
    most_windows: int = 0
    """Of an image or a recording among the normals behind the p-values."""
    of_windows: Conformal | None = None
    """Of recordings, each window by itself, as a stream scores them."""

    def at_rate(self, false_positive_rate: float) -> Calibration:
        """The same with the thresholds of another rate of false positives."""
        of_windows = self.of_windows
        if of_windows is not None:
            of_windows = of_windows.at_rate(false_positive_rate)
        return self._replace(
            conformal=self.conformal.at_rate(false_positive_rate), of_windows=of_windows
        )


class Part(NamedTuple):
    """Normals that were held out, and a model that has not seen them."""

    model: models.Model
    split: Split


def splits(
    usable: Sequence[int], groups: Sequence[Hashable] | None, config: DetectorConfig
) -> tuple[Split, list[Split]]:
    """The split of the normals, and none for folds; or all of them to fit on, and a split for each
    fold of a cross-fitted calibration."""
    split = split_by_group(usable, groups, config)
    count = config.cross_fit
    if count is None:
        few = len(set(split.conformal_groups)) < SMALLEST_CALIBRATION
        count = FOLDS if few and config.on_tokens and config.kind != "vector" else 0
    if not count:
        return split, []
    folds = cross_splits(usable, groups, count, config.seed)
    return Split(list(usable), [], [], [], [], []), folds


@torch.inference_mode()
def calibrate_mode(model, parts: Sequence[Part], samples) -> Calibration:
    """The mode's statistics on held-out normals, and with these the scores of others; the models
    of the parts score like ``model`` afterwards."""
    config, audio = model.config, model.config.kind == "audio"
    for part in parts:
        part.model.config = config
    total = sum(len(s.statistics) + len(s.conformal) for _, s in parts)
    bar = progress(None, total, "calibrating", samples.unit)

    def batches(name: str) -> Iterator[tuple]:
        for part in parts:
            indices = getattr(part.split, name)
            for batch in samples.batches(config.batch_size, indices=indices):
                yield part.model, batch
                bar.update(len(batch.index))

    def groups(name: str) -> dict[int, int]:
        return {
            i: number
            for _, split in parts
            for i, number in zip(
                getattr(split, name), getattr(split, f"{name}_groups"), strict=True
            )
        }

    def maps() -> Iterator[tuple[Sequence[torch.Tensor | None], Sequence[int]]]:
        group = groups("statistics")
        for part_model, batch in batches("statistics"):
            found = part_model.raw_maps(batch.x)
            if audio:  # clips have no positions in common, and not even a length
                found = [m.reshape(-1, 1, 1) for m in found]
            windows_each = next(len(m) for m in found if m is not None) // len(batch.index)
            yield found, [group[i] for i in batch.index.tolist() for _ in range(windows_each)]

    group = groups("conformal")
    held_out = _HeldOut(config, config.contamination)
    with bar:
        for part in parts:
            part.model.use(None)
        found = fit_statistics(
            maps(), config.statistics, model.statistics_smoothing, config.on_tokens
        )
        for each in {id(m): m for m in (model, *(part.model for part in parts))}.values():
            each.use(found)
        for part_model, batch in batches("conformal"):
            held_out.add(part_model, batch.x, [group[i] for i in batch.index.tolist()])
    return held_out.calibration(found)


@torch.inference_mode()
def recalibrate_mode(
    model, calibration: Calibration, samples, groups: Sequence[int] | None
) -> Calibration:
    """With the p-values of all these samples, which the model has not seen, in its mode."""
    held_out = _HeldOut(model.config, contamination=0.0)
    with progress(None, samples.length, "calibrating", samples.unit) as bar:
        for batch in samples.batches(model.config.batch_size):
            index = batch.index.tolist()
            held_out.add(model, batch.x, index if groups is None else [groups[i] for i in index])
            bar.update(len(index))
    return held_out.calibration(calibration.statistics)


class _HeldOut:
    """Scores of normals that were held out, and of the windows of recordings.

    contamination: the share of them that are taken for anomalies, those with the highest scores.
    """

    def __init__(self, config: DetectorConfig, contamination: float):
        self.config, self.contamination = config, contamination
        self.most_windows = 0
        self._scores: list[torch.Tensor] = []
        self._groups: list[int] = []
        self._of_windows: list[torch.Tensor] = []

    def add(self, model, x: torch.Tensor, groups: Sequence[int]) -> None:
        config = self.config
        if config.kind == "audio":
            curve = model.window_scores(x)
            count = curve.shape[1]
            score = top_mean(curve, config.top_fraction)
            if not config.remove_level:  # which a stream does not do
                self._of_windows += curve.cpu().double().unbind()
        else:
            score, count = model.score(x)[1], windows(config, x)
        self._scores.append(score.cpu().double())
        self._groups += groups
        self.most_windows = max(self.most_windows, count)

    def calibration(self, statistics: list[MapStatistics | None]) -> Calibration:
        rate = self.config.false_positive_rate
        scores, groups = torch.cat(self._scores).numpy(), np.array(self._groups)
        finite = np.isfinite(scores)
        if not finite.all():
            raise InputError(
                f"{np.count_nonzero(~finite)} of {len(scores)} held-out normals have no finite "
                f"score in mode {self.config.mode!r}, the first of them {scores[~finite][0]}: the "
                "denoiser or the features give values that are not finite, so mend that module, "
                "or fit anew with a lower learning_rate"
            )
        normal = np.argsort(scores, kind="stable")
        # The small term keeps a product such as 0.29 * 100 = 29 - 4e-15 on its side.
        normal = normal[: len(normal) - int(self.contamination * len(normal) + 1e-9)]
        of_windows = None
        if self._of_windows:
            own = [self._of_windows[i] for i in normal]
            group = np.repeat(groups[normal], list(map(len, own)))
            of_windows = Conformal(torch.cat(own).numpy(), group, rate)
        conformal = Conformal(scores[normal], groups[normal], rate)
        return Calibration(statistics, conformal, self.most_windows, of_windows)


def windows(config: DetectorConfig, x: torch.Tensor) -> int:
    """How many windows of images x are looked at, each for itself; 0 where they are resized."""
    if config.overlap is None:
        return 0
    return len(models.places(x.shape[2:], config.image_size, config.overlap))


def fingerprint(samples, usable: Sequence[int]) -> bytes:
    """By which a source is known again: of its first and its last usable sample."""
    digest = hashlib.sha256()
    for batch in samples.batches(1, indices=[usable[0], usable[-1]]):
        digest.update(batch.x.numpy().tobytes())
    return digest.digest()


def check_source(samples, split: Split, fitted_on: bytes) -> None:
    """Raise InputError for a source of another length than that of ``split``, or with another first
    or last sample."""
    usable = samples.load()
    known = np.concatenate([np.array(part, dtype=np.int64) for part in split[:4]])
    same = np.array_equal(usable, np.unique(known))
    if not same or fingerprint(samples, usable) != fitted_on:
        raise InputError(
            f"{len(usable)} usable {samples.unit}s are not what the detector was fitted on: "
            "calibrate on the same source, in the same order"
        )
