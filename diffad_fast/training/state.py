"""The state of an unfinished training on disk."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import time
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import DetectorConfig, duration
from ..errors import CheckpointError, InputError
from ..files import remove_leftovers
from . import checkpoint
from .history import History, is_history
from .optimizer import STATE

if TYPE_CHECKING:
    from .loop import Loop

KIND = "diffad-training"


@dataclass
class TrainingCheckpoint:
    """Where and how often the state of an unfinished training is kept, and its log."""

    path: str | os.PathLike
    seconds: float | str = 300.0
    """Interval between two writes, or a text such as "5min"."""
    resume: bool = False
    """Continue from ``path`` if it is there; a training that begins anew removes what is."""
    log: str | os.PathLike | None = None
    """A CSV file of losses by step; TensorBoard files go beside it where that is installed."""
    pictures_every: int | None = None
    """Every so many steps, and at the end, a PNG file in the folder ``log`` with the suffix
    ``.pictures``: held-out normals above their reconstructions above samples. Of U-Nets."""

    def __post_init__(self):
        if os.path.isdir(self.path):
            raise InputError(f"cannot write {self.path}: it is a folder; give a file name")
        if isinstance(self.seconds, str):
            self.seconds = duration(self.seconds)
        if type(self.seconds) not in (int, float) or not self.seconds >= 0:
            raise InputError(
                "seconds is the time between two writes, a number of at least 0 or a text such as "
                f"'5min', not {self.seconds!r}"
            )
        if self.pictures_every is not None:
            if not isinstance(self.pictures_every, int) or self.pictures_every < 1:
                raise InputError(
                    f"pictures_every is a number of steps of at least 1, not "
                    f"{self.pictures_every!r}"
                )
            if self.log is None:
                raise InputError("pictures lie beside the log: give log, too")

    def config(self) -> DetectorConfig | None:
        """Of the training that ``resume`` continues, with what it has settled; None if there is
        nothing to continue."""
        if not self.resume or not os.path.exists(self.path):
            return None
        return checkpoint.load(self.path, KIND)[1].config()

    def part(self, number: int) -> TrainingCheckpoint:
        """The same for one of several networks; files but for the first get its number."""
        if number == 0:
            return self
        log = None if self.log is None else Path(self.log).with_suffix(f".{number}.csv")
        return replace(self, path=f"{os.fspath(self.path)}.{number}", log=log)

    def fold(self, number: int) -> TrainingCheckpoint:
        """The same for one of the folds of a cross-fitted calibration, counted from 1."""
        log = None if self.log is None else Path(self.log).with_suffix(f".fold{number}.csv")
        return replace(self, path=f"{os.fspath(self.path)}.{number}-fold", log=log)

    def remove(self) -> None:
        """Remove the states of all parts, if they are there."""
        path = Path(self.path)
        own = re.compile(re.escape(path.name) + r"(\.\d+(-fold)?)*")
        for file in path.parent.glob(f"{glob.escape(path.name)}*"):
            if own.fullmatch(file.name):
                file.unlink(missing_ok=True)


class TrainingState:
    """The state of a :class:`Loop` in the file that ``kept`` names, which the first process writes;
    without ``kept`` there is none."""

    def __init__(self, loop: Loop, kept: TrainingCheckpoint | None):
        self.loop, self.kept = loop, kept
        self.writes = kept is not None and loop.processes.first
        self._written = time.monotonic()

    @cached_property
    def fingerprint(self) -> str:
        """What a state must share with a run to be continued by it."""
        digest = hashlib.sha256(self.loop.config.to_json().encode())
        digest.update(self.loop.optimizer.layout.encode())
        digest.update(self.loop.identity())
        return digest.hexdigest()

    def resume(self) -> int:
        """Bring the loop to where the file left it; the steps that were taken by then."""
        kept, processes = self.kept, self.loop.processes
        if kept is None:
            return 0
        if self.writes and not kept.resume:
            kept.remove()  # else a later resume would meet the states of networks of an older one
        done = self._load() if kept.resume and os.path.exists(kept.path) else 0
        if processes.agreed(done) != done:
            raise CheckpointError(
                f"process {processes.rank} finds another state in {kept.path} than the "
                "first one: keep it where all machines see it"
            )
        if self.writes:
            remove_leftovers(kept.path)
        return done

    @torch.no_grad()
    def _load(self) -> int:
        loop, path = self.loop, self.kept.path
        tensors, texts = checkpoint.load(path, KIND)
        if texts["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"{path} was left by a training with other options or other data: repeat "
                "those, or delete it to start anew"
            )
        numbers = {
            name: texts.json(name, lambda n: type(n) is int and n >= 0)
            for name in ("step", "total", "validations")
        }
        history = History(**texts.json("history", is_history))
        buffers = dict(loop.denoiser.named_buffers())
        vectors = {name: tensors.like(name, loop.optimizer.values) for name in STATE}
        loop.optimizer.load(vectors, numbers["step"])
        for name, buffer in buffers.items():
            buffer.copy_(tensors.like(f"buffer.{name}", buffer))
        if "best" in tensors:
            loop.best = tensors.like("best", loop.optimizer.values).to(loop.device)
        loop.best_buffers = {
            name: tensors.like(f"best_buffer.{name}", buffer)
            for name, buffer in buffers.items()
            if f"best_buffer.{name}" in tensors
        }
        loop.history = history
        loop.total, loop.validations = numbers["total"], numbers["validations"]
        return numbers["step"]

    def due(self) -> bool:
        """Is it time to write again?"""
        return self.writes and time.monotonic() - self._written >= self.kept.seconds

    def write(self, done: int, total: int, must: bool) -> None:
        """The state after ``done`` of ``total`` steps. Where it cannot be written the training goes
        on, unless it ``must`` be."""
        if not self.writes:
            return
        loop = self.loop
        tensors = {name: getattr(loop.optimizer, name) for name in STATE}
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise loop.diverged(done)
        tensors |= {f"buffer.{name}": b for name, b in loop.denoiser.named_buffers()}
        if loop.best is not None:
            tensors["best"] = loop.best
        tensors |= {f"best_buffer.{name}": b for name, b in loop.best_buffers.items()}
        texts = {
            "step": str(done),
            "total": str(total),
            "validations": str(loop.validations),
            "fingerprint": self.fingerprint,
            "config": loop.config.to_json(),
            "history": json.dumps(vars(loop.history)),
        }
        try:
            checkpoint.save(self.kept.path, KIND, tensors, texts)
        except InputError as error:
            if must:
                raise
            warnings.warn(
                f"the training goes on without its state being kept: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._written = time.monotonic()
