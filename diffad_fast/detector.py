"""The detector: fit on normal data, score new data, say where and how surely."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Hashable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from . import models
from .calibration import (
    Calibration,
    Part,
    calibrate_mode,
    check_source,
    fingerprint,
    recalibrate_mode,
    splits,
    windows,
)
from .config import MODES, DetectorConfig
from .data.audio_layouts import LabelledClip, labelled_clips
from .data.folders import is_path
from .data.groups import group_labels
from .data.image_layouts import labelled_images
from .data.mvtec import TestImage
from .data.samples import Batch, Samples
from .data.sources import check_layout, open_source, training_part
from .errors import InputError
from .evaluation import evaluate, evaluate_audio, evaluate_vectors
from .files import check_result_folder
from .progress import progress
from .scoring import Conformal, MapStatistics, Score, Split
from .streaming import Stream
from .surroundings import evaluating, resolve_device, undisturbed
from .training import checkpoint
from .training.distributed import Processes, processes, unjoined
from .training.history import History
from .training.state import TrainingCheckpoint

CUSTOM = "custom"


class Trajectory(NamedTuple):
    """The inversion of N samples in S steps.

    latent_norm (N,): mean square of the latent; of normals 1 in the limit of many steps and noise,
    about 0.5 in the three steps of the default. residuals (N,S): mean square
    of the way that each step goes in x / sqrt(alpha). path_length (N,): the sum of their roots.
    """

    latent_norm: np.ndarray
    path_length: np.ndarray
    residuals: np.ndarray


class Detector:
    """Anomaly detector by diffusion: of an image's wavelet coefficients, or of tokens.

    kind: "image"; "audio" for recordings; "vector" for the rows of tables and embeddings.
    image_size: side, or (height, width), in pixels to which every image is resized. channels: 1
    (grey) or 3 (colour). preset: "fast", "balanced" or "best", a whole recipe; for audio also
    "dcase", the spectrogram of that challenge. seed: of everything random. denoiser: overrides
    the preset's by name, or a module ``(x (N,C,h,w), log_sigma (N,)) -> prediction`` with, where
    maps or ``semantic_weight`` take its features, a method ``features`` of the same arguments that
    gives a list of feature maps. features: a module ``images (N,C,H,W) in [0,1] -> feature map
    (N,c,h,w) or list of them``, or a timm model's name: what semantic discrepancy and the token
    source "features" read; for audio "yamnet", a file of its weights (as
    ``integrations.yamnet.YAMNet`` reads them) or a module ``waves (M,samples) in [-1,1] ->
    embeddings (M,D)``; see :mod:`diffad_fast.protocols`. Its parameters no longer require gradients
    from then on. A module is used as it is, not copied: ``fit`` trains the denoiser that was handed
    over, and detectors that share one change each other. device: "cpu", "cuda", ... or None for the
    best there is. Further options by name: see :class:`diffad_fast.DetectorConfig`.

    Raises InputError for an unknown or impossible option, BackendError for a missing device.
    """

    def __init__(
        self,
        /,
        kind: str = "image",
        image_size: int | tuple[int, int] = 256,
        channels: int = 1,
        preset: str = "balanced",
        seed: int = 0,
        denoiser: str | nn.Module | None = None,
        features: str | nn.Module | None = None,
        device: str | torch.device | None = None,
        **options,
    ):
        module = denoiser if isinstance(denoiser, nn.Module) else None
        if module is not None:
            options["denoiser"] = CUSTOM
        elif denoiser is not None:
            options["denoiser"] = denoiser
        if features is not None:
            path = os.fspath(features) if isinstance(features, os.PathLike) else features
            options["features"] = CUSTOM if isinstance(features, nn.Module) else path
        config = DetectorConfig.create(
            kind=kind, image_size=image_size, channels=channels, preset=preset, seed=seed, **options
        )
        backbone = features if isinstance(features, nn.Module) else None
        self._set_up(config, device, module, backbone)

    @classmethod
    def _of_config(
        cls,
        config: DetectorConfig,
        device: str | torch.device | None = None,
        denoiser: nn.Module | None = None,
        features: nn.Module | None = None,
    ) -> Detector:
        """A detector of options as they are in a file, with the modules of its own that they
        name."""
        made = cls.__new__(cls)
        made._set_up(config, device, denoiser, features)
        return made

    @undisturbed
    def _set_up(
        self,
        config: DetectorConfig,
        device: str | torch.device | None,
        denoiser: nn.Module | None,
        features: nn.Module | None,
    ) -> None:
        self.device = resolve_device(device)
        # What was not asked for, a device or the number of a GPU, another process chooses anew.
        asked = None if device is None else str(torch.device(device))
        self._given = {"denoiser": denoiser, "features": features, "device": asked}
        if features is None and config.features is not None:
            features = _backbone(config)
        self._features = features
        with evaluating(denoiser, features):
            self.model = models.create(config, self.device, denoiser, features)
        # What ``fit`` has settled: of each option what it was, and what it is since.
        self._settled: dict[str, list] | None = None
        self.calibrations: dict[str, Calibration] = {}
        # Of the table that ``fit`` was given, if they had names.
        self.columns: list[str] | None = None
        self.parts: list[Part] = []
        self._fitted_on, self._fitted_part = b"", ()
        self.history = History()

    @property
    def config(self) -> DetectorConfig:
        """The options; a choice left to ``fit`` is settled in it after that."""
        return self.model.config

    @property
    def mode(self) -> str:
        """How scores are made from the model: "reconstruct", "invert" or "one_step".

        Can be set at any time: all modes share the one denoiser, and ``fit`` calibrates each.
        """
        return self.config.mode

    @mode.setter
    def mode(self, value: str) -> None:
        self.model.config = self.config.replace(mode=value)
        self.model.use(self.statistics)

    @property
    def statistics(self) -> list[MapStatistics | None] | None:
        """Of each raw map of the mode on held-out normals; None before ``fit``."""
        calibration = self.calibrations.get(self.mode)
        return None if calibration is None else calibration.statistics

    @property
    def conformal(self) -> Conformal | None:
        """The mode's scores of held-out normals; None before ``fit``."""
        calibration = self.calibrations.get(self.mode)
        return None if calibration is None else calibration.conformal

    @property
    def threshold(self) -> float | None:
        """The score above which a sample is labelled anomalous in the mode; None before ``fit``,
        and where the held-out normals are too few for labels."""
        return None if self.conformal is None else self.conformal.threshold

    @property
    def frequencies(self) -> np.ndarray | None:
        """(n_mels,) float64: of each band of a recording's map the frequency in Hz in its middle,
        which it hears best. None for other kinds."""
        if self.config.kind != "audio":
            return None
        return self.model.representation.logmel.frequencies.copy()

    def times(self, map_: np.ndarray) -> np.ndarray:
        """(steps,) float64: when each column of a recording's map begins, in seconds from the start
        of the recording.

        map_: (...,n_mels,steps) as in :class:`Score`. The last columns may begin after the end of a
        recording, which is mirrored to fill the last window, or repeated to fill the only one. A
        window begins with a column, ``Stream.window`` before its ``StreamScores.time``. Raises
        InputError for other kinds.
        """
        if self.config.kind != "audio":
            raise InputError(f"times are of audio: this detector's kind is {self.config.kind!r}")
        return np.arange(map_.shape[-1]) * self.config.step_samples / self.config.sample_rate

    @property
    def false_positive_rate(self) -> float:
        """The share of normals that labels may call anomalous: what thresholds are made from.

        Can be set at any time, of a loaded detector too; ``save`` keeps it.
        """
        return self.config.false_positive_rate

    @false_positive_rate.setter
    def false_positive_rate(self, value: float) -> None:
        config = self.config.replace(false_positive_rate=value)
        found = {mode: c.at_rate(value) for mode, c in self.calibrations.items()}
        self.model.config, self.calibrations = config, found

    # ---------------------------------------------------------------- fit

    @undisturbed
    def fit(
        self,
        source,
        *,
        groups: Sequence[Hashable] | None = None,
        strict: bool = False,
        layout: str = "auto",
        normal: str | None = None,
        folds: Sequence[int] | None = None,
        steps: int | None = None,
        budget: float | str | None = None,
        training_checkpoint: TrainingCheckpoint | None = None,
    ) -> Detector:
        """Train on normal data and calibrate every mode on held-out normals; where these would be
        few, on all of them, each by a model that has not seen it (``DetectorConfig.cross_fit``).

        source: for images a folder (of which ``data.image_layouts.training_images`` are taken), a
        list of files, an array or tensor (N,C,H,W) or (N,H,W) of uint8, uint16 or float in [0,1],
        or a DataLoader of such batches; for audio what ``data.audio.open_audio`` takes: a
        folder (of which the files of ``data.audio.training_clips`` are taken), files, waves, (wave,
        rate) pairs; for vectors what ``data.vectors.open_vectors`` takes, whose names of columns
        are kept: later tables with names may have them in any order, and must have the same.
        groups: one label for each sample; those of one label never stand on both sides of a
        split. None: what a layout tells, for audio the recordings that clips were cut from.
        strict: raise at the first unusable file instead of leaving it out with a warning.
        layout, normal, folds: how the folder of a data set is read, as in :meth:`evaluate`.
        steps: training steps, or budget: the time that the training may take, in seconds or as
        "5min"; they replace the configuration's, for later fits too. training_checkpoint: keep the
        state of the training on disk, and continue from it. Processes that torchrun started train
        together, once joined by :func:`diffad_fast.training.distributed.torchrun_group`.

        Begins anew whatever was fitted before, in this process or before a checkpoint was written,
        and settles anew what was left to it; only a denoiser that was handed over goes on from its
        weights, and with ``train_steps=0`` and no budget a built-in one keeps them.

        Returns self. Raises InputError for unusable data, for a folder without train/good that has
        a folder of tests below it, such as test or ground_truth, for a category of VisA without its
        table, for the root of an UrbanSound8K, whose normal class nobody has named, for fewer than
        8 samples or 4 groups, for scores of normals that are not finite, and where processes that
        train together have different samples; CheckpointError for the state of another training;
        BackendError where ``train_compile=True`` fails; ProcessError where another process ends;
        KeyboardInterrupt after SIGINT, its subclass Terminated after SIGTERM and SIGHUP, once the
        state is written.
        """
        if steps is not None and budget is not None:
            raise InputError(f"steps={steps} and budget={budget!r} exclude each other: give one")
        if not isinstance(training_checkpoint, TrainingCheckpoint | None):
            raise InputError(
                "training_checkpoint is a training.state.TrainingCheckpoint, not "
                f"{training_checkpoint!r}"
            )
        config = self._asked()
        if steps is not None:
            config = config.replace(train_steps=steps, train_budget=None)
        if budget is not None:
            config = config.replace(train_budget=budget)
        if (text := unjoined()) is not None:
            _warn_caller(text)
        part = layout, normal, None if folds is None else tuple(folds)
        source, told = training_part(self.config.kind, source, *part)
        groups = told if groups is None else groups
        samples = open_source(source, self.config, strict)
        usable = samples.load()
        samples.check_normal()
        groups = None if groups is None else group_labels(groups, len(samples))
        split, others = splits(usable, groups, self.config)
        fitted_on = fingerprint(samples, usable)
        _check_same(samples, usable, fitted_on)
        self._fitted_on, self._fitted_part = fitted_on, part
        self._begin(config)
        self.calibrations, self.parts = {}, []
        self.columns = samples.columns
        try:
            self._learn(samples, split, others, training_checkpoint)
        finally:
            before, after = dataclasses.asdict(config), dataclasses.asdict(self.config)
            self._settled = {k: [v, after[k]] for k, v in before.items() if v != after[k]}
        self.calibrate(samples)
        return self

    def _asked(self) -> DetectorConfig:
        """The options as they were asked for: what an earlier ``fit`` has settled is open again,
        unless it was changed since."""
        config, settled = self.config, self._settled or {}
        return config.replace(
            **{name: was for name, (was, now) in settled.items() if getattr(config, name) == now}
        )

    def _begin(self, config: DetectorConfig) -> None:
        """A model for ``config`` of which nothing is fitted."""
        if self._settled is None:
            self.model.config = config
            return
        self._release()
        denoiser = self._given["denoiser"]
        if denoiser is None and not config.on_tokens and not config.trains:
            denoiser = self.model.denoiser
        self.model = models.create(config, self.device, denoiser, self._features)

    def _release(self, *, but: object = None) -> None:
        """Give back the memory of the graphs of all models ``but`` one."""
        for model in (self.model, *(part.model for part in self.parts)):
            if model is not but:
                model.release()

    def __del__(self):
        try:
            self._release()
        except Exception:  # half made, or at the end of the process, when names are gone
            pass

    def _learn(
        self, samples, split: Split, folds: list[Split], kept: TrainingCheckpoint | None
    ) -> None:
        """Train this detector's model, and one for each fold with what that one has settled."""
        model, budget = self.model, self.config.train_budget
        if budget is not None:
            model.config = self.config.replace(train_budget=budget / (1 + len(folds)))
        try:
            self.history = model.learn(samples, split, kept)
            self.parts = [] if folds else [Part(model, split)]
            for number, fold in enumerate(folds, 1):
                other = models.create(self.config, self.device, None, self._features)
                part_of_kept = None if kept is None else kept.fold(number)
                self.history.seconds += other.learn(samples, fold, part_of_kept).seconds
                self.parts.append(Part(other, fold))
        finally:
            model.config = self.config.replace(train_budget=budget)
        if folds:
            self.history.notes.append(
                f"cross-fitted: {len(folds)} models, each without a part of the normals, gave "
                "statistics and p-values"
            )

    @undisturbed
    def calibrate(self, source, modes: Sequence[str] = MODES) -> None:
        """Calibrate modes anew, as ``fit`` does, after options of scoring were changed in
        ``model.config``. source: what the detector was fitted on, in the same process; a folder is
        read by the layout of the fit.

        Raises InputError before ``fit``, for a detector that comes from a file, which knows no
        held-out parts, for a ``semantic_weight`` of what was not fitted, and for a source of
        another length, or with another first or last sample, and for scores that are not finite.
        """
        if not self.parts:
            self._require_fitted()
            raise InputError(
                "which normals were held out is not kept in files: fit anew, or calibrate in the "
                "process that has fitted"
            )
        for mode in modes:
            self.config.replace(mode=mode)  # raises before anything is changed
        weight = self.config.semantic_weight
        if weight and not self.model.has_semantic:
            raise InputError(
                f"semantic_weight={weight:g} is for a distance that was not fitted, as the weight "
                f"was 0: fit again with semantic_weight={weight:g}"
            )
        part = self._fitted_part if is_path(source) else ()
        samples, wanted = self.open(training_part(self.config.kind, source, *part)[0]), self.mode
        check_source(samples, self.parts[0].split, self._fitted_on)
        try:
            found = {}
            for mode in modes:
                self.mode = mode
                found[mode] = calibrate_mode(self.model, self.parts, samples)
            self.calibrations |= found  # all or none, should this be interrupted
        finally:
            self.mode = wanted
            self._release(but=self.model)

    @undisturbed
    def recalibrate(
        self,
        source,
        *,
        groups: Sequence[Hashable] | None = None,
        modes: Sequence[str] = MODES,
        strict: bool = False,
        layout: str = "auto",
        normal: str | None = None,
        folds: Sequence[int] | None = None,
    ) -> Detector:
        """Take p-values and thresholds from other normals, such as a new camera's or those of a
        month of production; model and statistics of maps stay as they are.

        source, groups, strict, layout, normal, folds: as in :meth:`fit`; all that it would train on
        are taken for normal, and none of them may have been in the fit's source, or p-values are
        too large and anomalies are missed. With 20 groups or more there are labels. Works on loaded
        detectors; no other thread may use this one meanwhile. Returns self. Raises InputError for
        unusable data, an unknown mode, scores that are not finite, and before ``fit``.
        """
        self._require_fitted()
        for mode in modes:
            self.config.replace(mode=mode)  # raises before anything is changed
        source, told = training_part(self.config.kind, source, layout, normal, folds)
        groups = told if groups is None else groups
        samples = self.open(source, strict=strict)
        samples.load()
        samples.check_normal()
        numbers, wanted = None, self.mode
        if groups is not None:
            known: dict[Hashable, int] = {}
            numbers = [known.setdefault(g, len(known)) for g in group_labels(groups, len(samples))]
        try:
            found = {}
            for mode in modes:
                self.mode = mode
                before = self.calibrations[mode]
                found[mode] = recalibrate_mode(self.model, before, samples, numbers)
            self.calibrations |= found  # all or none, should this be interrupted
        finally:
            self.mode = wanted
        return self

    def open(self, source, *, strict: bool = False) -> Samples:
        """The samples of ``source`` (as in :meth:`score`), images in this detector's size, clips at
        its sampling rate, columns with names in the order of those it was fitted on."""
        samples = open_source(source, self.config, strict)
        samples.pinned = self.device.type == "cuda"
        if self.config.kind == "vector" and self.calibrations:
            samples = samples.arranged(self.columns)
            fitted, found = self.model.representation.dims[0], samples.rows.shape[1]
            if found != fitted:
                raise InputError(
                    f"the vectors have {found} features and the detector was fitted on {fitted}"
                )
        return samples

    # -------------------------------------------------------------- score

    def score(
        self, source, *, maps: bool = True, batch_size: int | None = None, strict: bool = False
    ) -> Score:
        """Score samples.

        source: as in :meth:`fit`, but of a folder all that is in it, whatever its layout, without
        the masks in folders named ground_truth. maps=False keeps no maps: memory then does not grow
        with the number of samples, but for a few numbers each. Processes that torchrun started and
        ``torchrun_group`` joined score together, in batches of the first one's size, and all have
        the whole answer. Raises InputError for unusable data, where processes have different
        samples, or before ``fit``.
        """
        return Score.join(self.score_iter(source, maps=maps, batch_size=batch_size, strict=strict))

    def score_iter(
        self, source, *, maps: bool = True, batch_size: int | None = None, strict: bool = False
    ) -> Iterator[Score]:
        """Yield a :class:`Score` a batch, in the order of ``source``; memory stays bounded.

        Files that cannot be used are left out and named in ``skipped`` of the batch after them.
        """
        pairs = self.score_pairs(source, maps=maps, batch_size=batch_size, strict=strict)
        return (score for _, score in pairs)

    def score_pairs(
        self, source, *, maps: bool = True, batch_size: int | None = None, strict: bool = False
    ) -> Iterator[tuple[Batch | None, Score]]:
        """As :meth:`score_iter`, each score with the batch that it is about; None where another
        process has scored it, and with what was left out at the end."""
        self._require_fitted()
        batch_size = self._batch_size(batch_size)
        if self.conformal.threshold is None:
            _warn_caller(f"label is None: {self.conformal.why_no_label()}")
        samples = self.open(source, strict=strict)
        maps = maps and self.config.kind != "vector"
        return self._score_pairs(samples, maps, batch_size)

    def _batch_size(self, asked: int | None) -> int:
        if asked is None:
            return self.config.batch_size
        if not isinstance(asked, (int, np.integer)) or isinstance(asked, bool) or asked < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, not {asked!r}")
        return int(asked)

    def _score_pairs(
        self, samples: Samples, maps: bool, batch_size: int
    ) -> Iterator[tuple[Batch | None, Score]]:
        together = processes()
        reported = 0
        with progress(None, samples.length, "scoring", samples.unit) as bar:
            if together.count > 1:
                for batch, score in self._score_together(samples, maps, batch_size, together):
                    yield batch, score
                    bar.update(len(score))
                return
            for batch in samples.batches(batch_size):
                skipped = samples.skipped[reported:]
                reported += len(skipped)
                yield batch, self._scored(batch, maps, skipped)
                bar.update(len(batch.index))
        if len(samples.skipped) > reported:
            yield None, _nothing(samples.skipped[reported:])

    def _score_together(
        self, samples: Samples, maps: bool, batch_size: int, together: Processes
    ) -> Iterator[tuple[Batch | None, Score]]:
        """Each process scores its share of the batches; all yield all of them, in order."""
        if samples.length is None:
            samples.load()
        everything = range(samples.length)
        values = b"" if samples.paths else fingerprint(samples, everything)
        _check_same(samples, everything, values)
        # Maps that one of them wants, the others compute; their shares are of one batch size.
        asked = maps
        told = together.gathered((maps, batch_size, samples.skipped))
        maps, batch_size = any(each for each, _, _ in told), told[0][1]
        round_size, found = batch_size * together.count, False
        # What was left out before, whoever met it, one of them tells.
        before = dict.fromkeys(pair for _, _, skipped in told for pair in skipped)
        left_out = list(before) if together.first else []
        reported = len(samples.skipped)
        for first in range(0, samples.length, round_size):
            start = min(first + together.rank * batch_size, samples.length)
            mine = range(start, min(start + batch_size, samples.length))
            batches = list(samples.batches(batch_size, indices=mine))
            scores = [self._scored(batch, maps, []) for batch in batches]
            scores.append(_nothing(left_out + samples.skipped[reported:]))
            left_out, reported = [], len(samples.skipped)
            for rank, part in enumerate(together.gathered(scores)):
                own = batches if rank == together.rank else []
                for batch, score in zip_longest(own, part):
                    found |= len(score) > 0
                    if len(score) or score.skipped:
                        yield batch, score if asked else dataclasses.replace(score, map=None)
        if not found:
            raise InputError(f"none of the {samples.length} {samples.unit}s can be used")

    def _scored(self, batch, maps: bool, skipped: list[tuple[str, str]]) -> Score:
        count, known = windows(self.config, batch.x), self.calibrations[self.mode].most_windows
        if count > known:
            _warn_caller(
                f"an image of {batch.x.shape[2]}x{batch.x.shape[3]} pixels has {count} windows and "
                f"the normals behind the p-values had at most {known}: the highest of "
                "more scores is higher, so p is too small and labels too many; fit on images as "
                "large as those that are scored"
            )
        map_, score = self.score_batch(batch.x, maps=maps)
        return Score(
            score=score,
            map=map_,
            p_value=self.conformal.p_value(score),
            label=self.conformal.label(score),
            paths=batch.paths,
            index=batch.index.numpy(),
            skipped=skipped,
        )

    @undisturbed
    @torch.inference_mode()
    def score_batch(
        self, x: torch.Tensor, *, maps: bool = True
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Maps (n,H,W) float32, None if not ``maps``, and scores (n,) float64 of one batch: images
        (n,C,H,W) of floats in [0,1], or of uint8, which go to a GPU as bytes and are divided by 255
        there, to the same scores; waves (n,samples) as ``data.audio.Clips`` gives them, whose maps
        are (n,n_mels,steps); or vectors (n,D), whose maps are (n,1,1).

        The innermost call: no decoding, no checks, no calibration of p-values. From a GPU maps come
        in page-locked memory, at the full rate of its bus.
        """
        map_, score = self.model.score(x)
        map_ = _on_host(map_).numpy() if maps else None
        return map_, score.cpu().double().numpy()  # which waits for both

    @undisturbed
    def trajectory(self, source, *, batch_size: int | None = None) -> Trajectory:
        """How samples go from data to noise in a deterministic inversion; ``source`` as in
        :meth:`score`. The mode is changed meanwhile: no other thread may use this detector."""
        self._require_fitted()
        batch_size = self._batch_size(batch_size)
        samples = self.open(source)
        wanted, parts = self.mode, []
        self.mode = "invert"
        try:
            with torch.inference_mode():
                for batch in samples.batches(batch_size):
                    parts.append([t.cpu().double().numpy() for t in self.model.trajectory(batch.x)])
        finally:
            self.mode = wanted
        latent, residuals = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Trajectory(latent, np.sqrt(residuals).sum(axis=1), residuals)

    def stream(self, rate: float) -> Stream:
        """Score a recording while it arrives, in chunks of any size, sampled ``rate`` times a
        second. Raises InputError for a detector of another kind than audio, or before ``fit``."""
        self._require_fitted()
        if self.config.kind != "audio":
            raise InputError(f"a stream is of audio: this detector's kind is {self.config.kind!r}")
        return Stream(self, rate)

    @undisturbed
    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """A U-Net's idea of images (N,C,H,W) of floats in [0,1], at the detector's size, without
        their anomalies: a tensor of that shape on the CPU.

        Raises InputError for images of another shape or with NaN, before ``fit``, and for a
        detector on tokens, which have no way back to an image.
        """
        if self.config.on_tokens:
            raise InputError(
                "the token MLP reconstructs tokens, not images: use a U-Net, such as "
                "denoiser='unet-small'"
            )
        self._require_fitted()
        shape = (self.config.channels, *self.config.image_size)
        found = tuple(getattr(images, "shape", ()))
        if not isinstance(images, torch.Tensor) or len(found) != 4 or found[1:] != shape:
            raise InputError(
                f"reconstruct takes a tensor (N, {', '.join(map(str, shape))}), not a "
                f"{type(images).__name__}{f' of shape {found}' if found else ''}"
            )
        if not images.is_floating_point() or not ((images >= 0) & (images <= 1)).all():
            raise InputError(
                f"reconstruct takes floats in [0, 1], not {images.dtype} from {images.min():g} to "
                f"{images.max():g}"
            )
        return self.model.reconstruct(images)

    def _require_fitted(self) -> None:
        if not self.calibrations:
            raise InputError("this detector is not fitted: call fit, or load a checkpoint")

    # ----------------------------------------------------------- evaluate

    def evaluate(
        self,
        data,
        *,
        strict: bool = False,
        report: str | os.PathLike | None = None,
        layout: str = "auto",
        normal: str | None = None,
        folds: Sequence[int] | None = None,
    ) -> dict:
        """Figures on a labelled test set.

        data: for images the root of a data set, to which layout belongs as in
        ``data.image_layouts.labelled_images``, or a list of ``data.mvtec.TestImage``; for audio the
        root of a data set, to which layout, normal and folds belong as in
        ``data.audio.labelled_clips``, or a list of its ``LabelledClip``; for vectors a table with
        labels, as in ``data.vectors.open_vectors``.

        Returns a dict that JSON can hold: image_auroc, pixel_auroc, aupro (to a false-positive
        rate of 0.3), f1_max (of images), pixel_f1_max, false_positive_rate and
        true_positive_rate of the labels, per_defect (the same figures for one kind of defect
        against all normals), threshold (that of the labels, no choice of the test's), latency_ms
        (median of single images, decoded image in, score and map out), n_normal, n_anomalous, and
        ``undefined``: why a figure is null. Pixel metrics are taken at each mask's own size. For
        vectors: auroc, pauc (to a false-positive rate of 0.1), f1_max, the two rates, threshold,
        the two numbers, latency_ms and ``undefined``. For audio: the same, real_time (seconds of
        sound a second, clip after clip), per_kind (auroc and pauc of one kind of anomaly against
        all normals), sections (of DCASE: auroc_source and auroc_target, of one domain's normals
        against all anomalies, and pauc) and harmonic_mean (of all of these).
        report: a folder for an HTML report of images or clips.
        Where an image has several masks, as in MVTec LOCO AD, their union is the truth of every
        figure; that data set's own sPRO, with its saturation thresholds, is not among them.
        Raises InputError for an unknown layout, a missing test folder, labels or mask, or a mask of
        the wrong size.
        """
        kind = self.config.kind
        if report is not None:
            check_result_folder(report)
        check_layout(kind, data, layout, normal, folds)
        if kind == "vector":
            if report is not None:
                raise InputError("a report shows images or clips: leave it out for vectors")
            return evaluate_vectors(self, data)
        if kind == "audio":
            if is_path(data):
                data = labelled_clips(data, layout, normal, folds)
            _check_labelled(data, LabelledClip, "data.audio.LabelledClip")
            evaluation = evaluate_audio(self, data, strict, maps=report is not None)
        else:
            if is_path(data):
                data = labelled_images(data, layout)
            _check_labelled(data, TestImage, "data.mvtec.TestImage")
            evaluation = evaluate(self, data, strict)
        if report is not None:
            from .report import write_report

            write_report(report, self, evaluation)
        return evaluation.metrics

    # --------------------------------------------------------- checkpoint

    def save(self, path: str | os.PathLike) -> None:
        """Write the fitted detector as one safetensors file, atomically. Raises InputError."""
        from .persistence import KIND

        checkpoint.save(path, KIND, *self.state())

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What a checkpoint holds, tensors and texts."""
        from .persistence import state

        self._require_fitted()
        return state(self)

    def __reduce__(self):
        """Pickled as bytes, of its checkpoint and of the modules that are not in that: tensors
        would go to other processes through a file of shared memory each."""
        content, modules = self._parts_of_copies()
        buffer = io.BytesIO()
        torch.save(modules, buffer)
        return _unpickled, (content, buffer.getvalue())

    def __deepcopy__(self, memo: dict) -> Detector:
        content, modules = self._parts_of_copies()
        made = _made(content, copy.deepcopy(modules, memo) | {"device": self.device})
        made._given["device"] = self._given["device"]  # what its pickles ask for
        return made

    def __copy__(self) -> Detector:
        # A shallow copy would share the denoiser that was handed over, and a fit trains that.
        return copy.deepcopy(self)

    def _parts_of_copies(self) -> tuple[bytes | str, dict]:
        """A checkpoint, or an unfitted one's options, and what was handed over. A backbone goes
        along, also one that was fetched by name: elsewhere it may be another one, or nobody may
        fetch it."""
        from .persistence import KIND

        given = self._given | {"features": self._features}
        if not self.calibrations:
            return self._asked().to_json(), given
        return checkpoint.to_bytes(KIND, *self.state()), given

    # ------------------------------------------------------ other programs

    @undisturbed
    def export(
        self,
        path: str | os.PathLike,
        format: str = "torch",
        mode: str | None = None,
        uint8: bool = False,
    ) -> None:
        """Write the fitted detector as a program that runs without this library, atomically.

        format: "torch", a ``torch.export`` program (.pt2, read by ``torch.export.load``); "aoti",
        that program compiled for this machine's kind of CPU (.pt2, read by
        ``torch._inductor.aoti_load_package``; needs a C++ compiler); "onnx" (needs onnxscript).
        mode: how scores are made; None: the detector's own. uint8: images come as 0..255.

        Its input is a batch of any length: images (N,C,H,W) at the detector's size, float32 in
        [0,1] or uint8, or vectors (N,D) float32. Its outputs are named score, p_value, label (where
        there is a threshold) and map (of images), as in :class:`Score`. The configuration lies in
        the file as text. Raises InputError, also for audio, of which a program would
        lack what decodes, resamples and cuts recordings, for ``overlap``, for U-Nets that score
        in bfloat16 as "onnx", for a denoiser that cannot be traced for batches of any length, as
        some from diffusers, and for paths of "torch" and "aoti" that do not end in .pt2, and
        ImportError where a package is missing.
        """
        from .integrations.export import export

        self._require_fitted()
        detector = self
        if mode not in (None, self.mode):
            detector = copy.copy(self)  # others may score by this one
            detector.mode = mode
        export(detector, path, format, uint8)

    @staticmethod
    def from_diffusers(pipeline, **options) -> Detector:
        """A detector on an unconditional diffusers pipeline, a ``UNet2DModel`` on pixels.

        pipeline: a DDPMPipeline, DDIMPipeline or the like, or what its ``from_pretrained`` takes.
        options: of :class:`Detector`. Without ``train_steps`` or a budget ``fit`` trains nothing:
        it calibrates on normal images. The levels of its schedule are matched by their noise.
        :func:`load` reads such a detector with ``denoiser=`` that of a detector from the same
        pipeline, ``Detector.from_diffusers(...).model.denoiser``.

        Raises InputError for a pipeline of another kind, and for a scheduler with dynamic
        thresholds below 1 or another schedule of betas than DDIM's; ImportError without diffusers.
        """
        from .integrations.diffusers import detector_from_diffusers

        return detector_from_diffusers(pipeline, **options)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        data: str | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options,
    ) -> str | None:
        """Write a folder as model hubs expect it: model.safetensors, config.json, README.md.

        data: a sentence for the model card, README.md, on what the detector was fitted on. A
        README.md that is there stays, with a warning, unless it is a card that this version wrote
        and nobody has edited: delete it to have a new one. repo_id: the repository that the card
        names. push_to_hub: upload it too, to that one (default: of the folder's name) and with the
        options of :meth:`push_to_hub`, whose answer is returned.
        """
        from .integrations.hub import save_pretrained

        self._require_fitted()  # before a folder is made
        if options and not push_to_hub:
            raise TypeError(f"{', '.join(options)}: only for push_to_hub=True")
        kept = save_pretrained(self, folder, data, repo_id)
        if push_to_hub:
            options = {"card": kept, **options}
            return self.push_to_hub(repo_id or Path(folder).name, data=data, **options)
        return None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        data: str | None = None,
        commit_message: str = "Push an anomaly detector of diffad_fast",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        card: str | None = None,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to a repository of the Hugging Face Hub, which
        is made if it is not there; return the address of the commit.

        repo_id: owner/name, or a name among one's own. data: as in :meth:`save_pretrained`. The
        others are those of huggingface_hub: who sees a new repository, the token of one's account
        (default: that of ``hf auth login``), a branch that is there, and whether to ask for the
        change instead of making it. card: the text of the model card; None: one that tells of the
        detector, unless there is one in the repository that was edited, which stays, with a
        warning.

        Raises InputError for a detector that is not fitted, ImportError without huggingface_hub,
        and huggingface_hub's own errors.
        """
        from .integrations.hub import push_to_hub

        return push_to_hub(
            self, repo_id, data, commit_message, private, token, branch, create_pr, card
        )

    @staticmethod
    def from_pretrained(name: str | os.PathLike, **options) -> Detector:
        """Read what :meth:`save_pretrained` wrote: a folder, or a repository of the Hugging Face
        Hub, which needs huggingface_hub.

        options: revision, token, cache_dir, force_download and local_files_only of the download,
        and those of :func:`load`. Raises what that raises, InputError for a name that is neither,
        ImportError without huggingface_hub, and huggingface_hub's own errors.
        """
        from .integrations.hub import from_pretrained

        return from_pretrained(name, **options)


def _check_labelled(data, kind: type, name: str) -> None:
    """Raise InputError for what is no list of that kind."""
    listed = isinstance(data, (list, tuple)) and len(data) > 0
    if not listed or not all(isinstance(sample, kind) for sample in data):
        raise InputError(
            f"evaluate cannot read a {type(data).__name__}: give the root of a data set, or a list "
            f"of {name} that is not empty"
        )


def _check_same(samples: Samples, indices: Sequence[int], values: bytes) -> None:
    """Raise InputError, in all of the processes that work together, where these ``indices`` of
    their samples differ in number, in ``values`` or in the names of the files: without the folders,
    which may lie elsewhere on another machine."""
    together = processes()
    if together.count == 1:
        return
    digest = hashlib.sha256(values)
    for index in indices if samples.paths else ():
        digest.update(os.fsencode(os.path.basename(samples.paths[index])) + b"\0")
    told = together.gathered((len(indices), digest.digest()))
    if len(set(told)) > 1:
        counts = [f"rank {rank} has {count}" for rank, (count, _) in enumerate(told)]
        others = [str(rank) for rank, own in enumerate(told) if own != told[0]]
        raise InputError(
            f"processes that work together need the same {samples.unit}s in the same order, and "
            f"those of rank {', '.join(others)} differ from rank 0's ({', '.join(counts)}): give "
            "all of them the whole source, of which each takes its share by itself"
        )


def _warn_caller(text: str) -> None:
    """A warning that names the line outside of this package from which it was called."""
    frame, level = sys._getframe(), 1
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _on_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory; from a GPU it is on its way there, in the current stream."""
    if not x.is_cuda:
        return x.cpu()
    page_locked = torch.empty(x.shape, dtype=x.dtype, pin_memory=True, device="cpu")
    return page_locked.copy_(x, non_blocking=True)


def _nothing(skipped: list[tuple[str, str]]) -> Score:
    """The answer for files of which none could be used."""
    none = np.empty(0)
    return Score(none, none, none, none, [], none, skipped)


def _backbone(config: DetectorConfig) -> nn.Module:
    """The pretrained one that ``features`` names. Raises InputError for an unknown name."""
    if config.kind == "image":
        from .integrations.timm import TimmFeatures

        return TimmFeatures(config.features, config.channels)
    from .integrations.yamnet import YAMNet

    if config.features == "yamnet":
        return YAMNet.pretrained()
    if os.path.isfile(config.features):
        return YAMNet(config.features)
    raise InputError(
        f"unknown features {config.features!r} for audio: choose 'yamnet' or a file of its "
        "weights, which must be there, or pass a module"
    )


def _unpickled(content: bytes | str, modules: bytes) -> Detector:
    """What :meth:`Detector.__reduce__` names."""
    given = torch.load(io.BytesIO(modules), map_location="cpu", weights_only=False)
    return _made(content, given)


def _made(content: bytes | str, options: dict) -> Detector:
    """Of a checkpoint, or of an unfitted one's options."""
    from .persistence import KIND, from_state

    if isinstance(content, str):
        return Detector._of_config(DetectorConfig.from_json(content), **options)
    name = "the pickle"
    return from_state(*checkpoint.from_bytes(content, name, KIND), name, **options)
