"""The training loop, whatever is trained on. Every random choice depends on the seed, the sample
and the step alone, never on a generator's history or on the number of processes: a run that was
stopped continues bit for bit."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import signal
import statistics
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..config import DetectorConfig
from ..errors import BackendError, CheckpointError, DiffadError, InputError
from ..files import remove_leftovers
from ..progress import progress
from . import checkpoint
from .distributed import ProcessError, processes
from .log import Log
from .optimizer import STATE, Optimizer
from .step import CapturedStep

KIND = "diffad-training"
# Losses are read from the device this often; in between the host waits for nothing.
REPORT_EVERY = 20
VALIDATIONS = 10  # in a run
# Steps that tell what one costs; on a GPU the first ones are spent on its capture.
TRIAL_STEPS = {"cpu": 3, "cuda": 16}
# Where torch.compile is tried, and the seconds that a training must take for that: compiling takes
# about a minute, and as the vendor's convolutions stay, a step loses a third of its time at most.
COMPILED_ON, WORTH_COMPILING = ("cuda",), 180.0
SMALLEST_GAIN = 1.05  # times faster; a difference below that is noise


@dataclass
class TrainingCheckpoint:
    """Where and how often the state of an unfinished training is kept, and its log."""

    path: str | os.PathLike
    seconds: float = 300.0
    """Interval between two writes."""
    resume: bool = False
    """Continue from ``path`` if it is there."""
    log: str | os.PathLike | None = None
    """A CSV file of losses by step; TensorBoard files go beside it where that is installed."""
    pictures_every: int | None = None
    """Every so many steps, and at the end, a PNG file in the folder ``log`` with the suffix
    ``.pictures``: held-out normals above their reconstructions above samples. Of U-Nets."""

    def __post_init__(self):
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
        return DetectorConfig.from_json(checkpoint.load(self.path, KIND)[1]["config"])

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


@dataclass
class History:
    """What a training run reports: losses by step, and the seconds that it took in all."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    validation_loss: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    best_step: int | None = None
    """The step after which the averaged weights had the lowest validation loss: those are kept."""
    compiled: bool = False
    """The steps went through torch.compile."""
    notes: list[str] = field(default_factory=list)
    """What trials have found, in words."""

    @property
    def steps(self) -> int:
        """Steps that were taken; of several networks by each."""
        return max((step for step, _ in self.loss), default=-1) + 1

    @property
    def kept_loss(self) -> float | None:
        """The validation loss of the weights that were kept; None without any, and for several
        networks, of which each has its own."""
        if self.best_step is None:
            return None
        return dict(self.validation_loss)[self.best_step]

    @staticmethod
    def joined(parts: Sequence[History]) -> History:
        """The losses of several networks, one after another, and their seconds together."""
        if len(parts) == 1:
            return parts[0]
        return History(
            loss=[entry for part in parts for entry in part.loss],
            validation_loss=[entry for part in parts for entry in part.validation_loss],
            seconds=sum(part.seconds for part in parts),
            compiled=any(part.compiled for part in parts),
            notes=[note for part in parts for note in part.notes],
        )


class Loop(ABC):
    """Trains a denoiser and leaves the averaged weights of the lowest validation loss in it.

    A subclass says what a step consists of: :meth:`inputs` names its samples on the host,
    :meth:`loss` computes on the device. Of a step's ``batch`` samples each process computes an
    equal share, ``accumulate`` parts of it one after another where memory is short. On one GPU the
    step is captured once and then replayed.
    """

    unit: str
    """What a sample is called."""
    picture: Callable[[], np.ndarray] | None = None
    """Draws held-out samples and what the denoiser makes of them, (H,W,3) uint8; None where
    samples cannot be seen."""

    def __init__(
        self, denoiser: nn.Module, config: DetectorConfig, device, batch: int, accumulate: int = 1
    ):
        self.denoiser, self.config, self.device = denoiser, config, torch.device(device)
        self.processes = processes()
        if batch % (self.processes.count * accumulate):
            raise InputError(
                f"a step has {batch} {self.unit}s: that must be a multiple of {accumulate} parts "
                f"in each of {self.processes.count} process(es)"
            )
        self.batch, self.accumulate = batch, accumulate
        self.history = History()
        self.total, self.validations = config.train_steps, VALIDATIONS
        self.dtype = training_dtype(config, self.device)

    @abstractmethod
    def inputs(self, step: int) -> tuple[torch.Tensor, ...]:
        """What :meth:`loss` needs of this process's share of a step, on the host: the same shapes
        each time, first axes divisible by ``accumulate``."""

    @abstractmethod
    def loss(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The loss, a mean over samples, for inputs on the device or a part of them."""

    @abstractmethod
    def validation_loss(self) -> float | None:
        """Of the denoiser as it is, over all held-out samples; None without any."""

    @abstractmethod
    def identity(self) -> bytes:
        """What a state must share with a run to be continued by it, beside the options."""

    def run(self, kept: TrainingCheckpoint | None = None) -> History:
        """Train to the end. On SIGINT or SIGTERM: write the state, then raise KeyboardInterrupt.

        Raises InputError for a loss that is not finite, CheckpointError for a state that does not
        belong to this run, BackendError where the step shall be compiled and cannot, ProcessError
        where another process has ended, after the state of the last complete step was written.
        """
        self.optimizer = Optimizer(self.denoiser, self.config)
        self.best: torch.Tensor | None = None
        self.denoiser.train()
        try:
            self._run(kept)
        finally:
            self.optimizer.release()
            self.denoiser.eval()
        return self.history

    def _run(self, kept: TrainingCheckpoint | None) -> None:
        start = 0
        if kept is not None:
            if kept.pictures_every and self.picture is None:
                raise InputError(
                    f"pictures are drawn of images by a U-Net, not of {self.unit}s: leave "
                    "pictures_every out, or choose a denoiser such as 'unet-small'"
                )
            if kept.resume and os.path.exists(kept.path):
                start = self._load(kept)
            if self.processes.agreed(start) != start:
                raise CheckpointError(
                    f"process {self.processes.rank} finds another state in {kept.path} than the "
                    "first one: keep it where all machines see it"
                )
            if self.processes.first:
                remove_leftovers(kept.path)
        clock = _Clock(self.history.seconds)
        if start == 0:
            step_of, seconds = self._chosen_step(clock)
            if self.config.train_budget is not None:
                self.total = self._affordable(step_of, seconds, clock)
        else:
            step_of = self.step_function(self.history.compiled)
        bar = progress(
            None, self.total * self.batch, "training", self.unit, initial=start * self.batch
        )
        log = Log(kept.log if kept and self.processes.first else None, start)
        done = start
        with bar, log, _deferred_signals() as signals:
            for note in self.history.notes if start == 0 else ():
                log.note(start, note)
            try:
                for step in range(start, self.total):
                    interrupted, late = bool(signals), self._late(clock)
                    loss = self._run_step(step, step_of, interrupted, late)
                    done, last = step + 1, step + 1 == self.total
                    self.history.seconds = clock.seconds()
                    bar.update(self.batch)
                    if step % REPORT_EVERY == 0 or last:
                        self._report(step, float(loss), bar, log)
                    interrupted, late = self._agreed(step, interrupted, late)
                    # An interrupted step is complete, and not taken again: its validation counts.
                    if late or last or done % max(1, self.total // self.validations) == 0:
                        self._validate(step, log)
                    if (
                        kept and kept.pictures_every and self.processes.first
                        and (late or last or done % kept.pictures_every == 0)
                    ):  # fmt: skip
                        self._draw(done, log)
                    if kept and self.processes.first and (interrupted or clock.due(kept.seconds)):
                        self._keep(kept, done, must=interrupted)
                        clock.kept()
                    if interrupted:
                        raise KeyboardInterrupt
                    if late or self._waited() >= self.config.early_stopping > 0:
                        if self.history.steps < done:
                            self._report(step, float(loss), bar, log)
                        break
            except ProcessError as error:
                # A step's update follows its exchange: this is the state after `done` steps.
                if kept and self.processes.first:
                    self._keep(kept, done, must=True)
                    raise ProcessError(
                        f"{error}; the training is kept in {kept.path} after {done} steps"
                    ) from None
                raise
        if kept and self.processes.first:
            # Complete: what follows, other networks and the calibration, may be interrupted too.
            self.total = done
            self._keep(kept, done, must=False)
        self.optimizer.exchange(self.optimizer.average if self.best is None else self.best)
        self.history.seconds = clock.seconds()

    # --------------------------------------------------------------- a step

    def _run_step(self, step: int, step_of, interrupted: bool, late: bool) -> torch.Tensor:
        self.optimizer.set(step, learning_rate(self.config, step, self.total))
        if self.processes.count > 1:
            self.optimizer.extra[1:] = torch.tensor([float(interrupted), float(late)])
        return step_of(*self.inputs(step))

    def step_function(self, compiled: bool = False) -> Callable[..., torch.Tensor]:
        """From :meth:`inputs` to the loss of an update, on the device: to be read before the next
        step. compiled: the loss, from noising to the weighted error, and its backward pass are
        through torch.compile; nothing is compiled before the first call."""
        loss = torch.compile(self.loss, dynamic=False) if compiled else self.loss
        step = partial(self._step, loss)
        if self.device.type == "cuda" and self.processes.count == 1:
            return CapturedStep(step, self.device)
        return step

    def _step(self, loss_of: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        optimizer = self.optimizer
        optimizer.gradient.zero_()
        inputs = tuple(t.to(self.device, non_blocking=True) for t in inputs)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for part in zip(*(t.chunk(self.accumulate) for t in inputs), strict=True):
            loss = loss_of(*part) / self.accumulate
            loss.backward()
            total += loss.detach()
        optimizer.extra[0] = total
        if self.processes.count > 1:
            self.processes.add(optimizer.shared)
            optimizer.gradient.div_(self.processes.count)
            optimizer.extra[0].div_(self.processes.count)
        optimizer.update()
        return optimizer.extra[0]

    def _agreed(self, step: int, interrupted: bool, late: bool) -> tuple[bool, bool]:
        """What any process asked for in this step, so that all do the same."""
        if self.processes.count == 1:
            return interrupted, late
        if self.device.type == "cuda" and step % REPORT_EVERY:
            return False, False  # reading it makes the host wait
        return tuple(bool(flag) for flag in self.optimizer.extra[1:].tolist())

    def _report(self, step: int, loss: float, bar, log: Log) -> None:
        if not math.isfinite(loss):
            raise self._diverged(step)
        self.history.loss.append((step, loss))
        bar.set_postfix(refresh=False, loss=f"{loss:.4f}")
        rate = learning_rate(self.config, step, self.total)
        log.write(step, seconds=self.history.seconds, learning_rate=rate, loss=loss)

    def _diverged(self, step: int) -> InputError:
        return InputError(
            f"the training loss became infinite or NaN by step {step}: lower learning_rate (now "
            f"{self.config.learning_rate:g})"
        )

    @torch.no_grad()
    def _validate(self, step: int, log: Log) -> None:
        """The averaged weights' loss on held-out normals; keeps those of the lowest."""
        with self._averaged():
            loss = self.validation_loss()
        if loss is None:
            return
        history = self.history
        if self.best is None or loss < min(value for _, value in history.validation_loss):
            self.best, history.best_step = self.optimizer.average.clone(), step
        history.validation_loss.append((step, loss))
        log.write(step, seconds=history.seconds, validation_loss=loss)

    @torch.no_grad()
    def _draw(self, steps: int, log: Log) -> None:
        """A picture by the averaged weights. Where it cannot be written the training goes on."""
        with self._averaged():
            picture = self.picture()
        try:
            log.picture(steps, picture)
        except InputError as error:
            warnings.warn(
                f"the training goes on without a picture: {error}", RuntimeWarning, stacklevel=2
            )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The denoiser as it is kept in the end."""
        self.optimizer.exchange(self.optimizer.average)
        self.denoiser.eval()
        try:
            yield
        finally:
            self.denoiser.train()
            self.optimizer.exchange(self.optimizer.average)

    def _waited(self) -> int:
        """Validations since the best one."""
        best = self.history.best_step
        return 0 if best is None else sum(s > best for s, _ in self.history.validation_loss)

    # --------------------------------------------------------------- trials

    def _chosen_step(self, clock: _Clock) -> tuple[Callable, float | None]:
        """The step's function, compiled where that is wanted or, by a trial, pays; and the seconds
        of a step, if there was a trial."""
        wanted, budget = self.config.train_compile, self.config.train_budget
        if wanted is True:
            self.history.compiled = True
            return self._compiled_step()[0], None
        if wanted is False or self.device.type not in COMPILED_ON:
            return self.step_function(), None

        def undecided(times: list[float]) -> bool:
            return len(times) < TRIAL_STEPS[self.device.type]

        # No captured step outlives its trial: each holds the memory of all its activations.
        before = _typical(self._trial(self.step_function(), undecided))
        planned = self.total * before if budget is None else budget - clock.seconds()
        if not self.processes.agreed(planned >= WORTH_COMPILING):
            self.history.notes.append(
                f"not compiled: about {planned:.0f} s of training are too short for a trial"
            )
            return self.step_function(), before
        try:
            step_of, times = self._compiled_step(undecided)
        except BackendError as error:
            self.history.notes.append(f"not compiled: {error}")
            return self.step_function(), before
        after = _typical(times)
        # The seconds of compiling are spent either way.
        compiled = self.history.compiled = self.processes.agreed(after * SMALLEST_GAIN <= before)
        self.history.notes.append(
            f"{'compiled' if compiled else 'not compiled'}: {1e3 * after:.2f} ms a compiled step, "
            f"{1e3 * before:.2f} ms an eager one, "
            f"{sum(times) - after * len(times):.0f} s to compile"
        )
        return (step_of, after) if compiled else (self.step_function(), before)

    def _compiled_step(
        self, undecided: Callable[[list[float]], bool] = lambda times: not times
    ) -> tuple[Callable, list[float]]:
        """The compiled step and the seconds of a trial. Raises BackendError where that fails."""
        try:
            step_of = self.step_function(compiled=True)
            return step_of, self._trial(step_of, undecided)
        except (DiffadError, KeyboardInterrupt):
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise BackendError(
                f"torch.compile fails on the training step ({type(error).__name__}: {reason}); "
                "train_compile=False does without"
            ) from error

    def _trial(self, step_of: Callable, undecided: Callable[[list[float]], bool]) -> list[float]:
        """Seconds of steps whose effect is undone, as long as ``undecided(seconds)``.

        The first process decides: all take part in every step.
        """
        optimizer, times = self.optimizer, []
        before = {name: getattr(optimizer, name).detach().clone() for name in STATE}
        buffers = [b.clone() for b in self.denoiser.buffers()]
        optimizer.set(0, 0.0)
        try:
            while self.processes.agreed(undecided(times)):
                began = time.monotonic()
                float(step_of(*self.inputs(len(times))))
                times.append(time.monotonic() - began)
        finally:
            optimizer.load(before, 0)
            for buffer, old in zip(self.denoiser.buffers(), buffers, strict=True):
                buffer.copy_(old)
        return times

    def _affordable(self, step_of: Callable, seconds: float | None, clock: _Clock) -> int:
        """How many steps of so many seconds, None: of those that a trial takes, fit into the
        budget."""
        budget = self.config.train_budget

        def undecided(times: list[float]) -> bool:
            wanted = len(times) < TRIAL_STEPS[self.device.type] or sum(times) < 0.02 * budget
            return not times or (wanted and clock.seconds() < budget / 4)

        if seconds is None:
            seconds = _typical(self._trial(step_of, undecided))
        began = time.monotonic()
        with torch.no_grad(), self._averaged():
            self.validation_loss()
        validation = time.monotonic() - began
        # As many validations, and one to spare, as a quarter of the time is enough for.
        left = budget - clock.seconds()
        count = VALIDATIONS + 1
        if count * validation > left / 4:
            count = max(1, int(left / 4 / validation))
        steps = max(1, int((left - count * validation) / seconds))
        steps, self.validations = self.processes.agreed((steps, max(1, count - 1)))
        if steps < self.config.warmup_steps and self.processes.first:
            warnings.warn(
                f"{budget:.3g} s, the budget or this network's share of it, are enough for {steps} "
                f"steps of {seconds:.2g} s, fewer than the {self.config.warmup_steps} in which the "
                "learning rate rises: give more, or fewer warmup_steps",
                RuntimeWarning,
                stacklevel=2,
            )
        return steps

    def _late(self, clock: _Clock) -> bool:
        budget = self.config.train_budget
        return budget is not None and clock.seconds() >= budget and self.processes.first

    # ---------------------------------------------------------------- state

    @cached_property
    def _fingerprint(self) -> str:
        """What a state must share with a run to be continued by it."""
        digest = hashlib.sha256(self.config.to_json().encode())
        digest.update(self.optimizer.layout.encode())
        digest.update(self.identity())
        return digest.hexdigest()

    def _keep(self, kept: TrainingCheckpoint, step: int, must: bool) -> None:
        """Write the state. Where that fails the training goes on, unless it ``must`` be kept."""
        tensors = {name: getattr(self.optimizer, name) for name in STATE}
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise self._diverged(step)
        tensors |= {f"buffer.{name}": b for name, b in self.denoiser.named_buffers()}
        if self.best is not None:
            tensors["best"] = self.best
        texts = {
            "step": str(step),
            "total": str(self.total),
            "validations": str(self.validations),
            "fingerprint": self._fingerprint,
            "config": self.config.to_json(),
            "history": json.dumps(vars(self.history)),
        }
        try:
            checkpoint.save(kept.path, KIND, tensors, texts)
        except InputError as error:
            if must:
                raise
            warnings.warn(
                f"the training goes on without its state being kept: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    @torch.no_grad()
    def _load(self, kept: TrainingCheckpoint) -> int:
        tensors, texts = checkpoint.load(kept.path, KIND)
        if texts["fingerprint"] != self._fingerprint:
            raise CheckpointError(
                f"{kept.path} was left by a training with other options or other data: repeat "
                "those, or delete it to start anew"
            )
        step = int(texts["step"])
        self.optimizer.load(tensors, step)
        for name, buffer in self.denoiser.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        if "best" in tensors:
            self.best = tensors["best"].to(self.device)
        self.history = History(**json.loads(texts["history"]))
        self.total = int(texts["total"])
        self.validations = int(texts.get("validations", VALIDATIONS))
        return step


def _typical(seconds: list[float]) -> float:
    """Of a step: the first ones load libraries, compile and fill caches."""
    return statistics.median(seconds[len(seconds) // 2 :])


class _Clock:
    """Seconds of training, over all its interruptions, and since the state was kept."""

    def __init__(self, spent: float):
        self._began, self._kept = time.monotonic() - spent, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def due(self, interval: float) -> bool:
        return time.monotonic() - self._kept >= interval

    def kept(self) -> None:
        self._kept = time.monotonic()


def training_dtype(config: DetectorConfig, device: torch.device) -> torch.dtype:
    """Of matrix products and convolutions in training; weights and sums are float32."""
    if config.train_dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, config.train_dtype)


def learning_rate(config: DetectorConfig, step: int, total: int) -> float:
    """Linear warm-up, then half a cosine to a hundredth after ``total`` steps."""
    # A short run warms up for at most a tenth of itself.
    warmup = min(config.warmup_steps, max(1, total // 10))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def visits(n: int, start: int, stop: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(position, epoch), int64, of the samples number ``start`` to ``stop`` of a whole run over n:
    every epoch in an order of its own."""
    positions, epochs = [], []
    while start < stop:
        epoch, first = divmod(start, n)
        part = _shuffled(n, seed, epoch)[first : first + stop - start]
        positions.append(part)
        epochs.append(torch.full_like(part, epoch))
        start += len(part)
    return torch.cat(positions), torch.cat(epochs)


@lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def stratified(n: int, generator: torch.Generator) -> torch.Tensor:
    """n numbers in [0, 1), ascending, one in each n-th, all by the same offset: the expectation of
    independent ones with less spread (Kingma et al. 2021, appendix I.1)."""
    u = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(n)) / n
    return u.clamp(max=1 - 2**-24)


def generator(seed: int, stream: str, number: int) -> torch.Generator:
    """A generator of its own for every (seed, stream, number)."""
    digest = hashlib.blake2b(f"{seed} {stream} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of breaking into the middle of an update.

    Python allows handlers in the main thread only; elsewhere signals act as always, and so do
    those with a handler that was not made by Python, which it could not put back.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not None
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
