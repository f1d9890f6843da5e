"""The training loop, whatever is trained on. Every random choice depends on the seed, the sample
and the step alone, never on a generator's history or on the number of processes, unless they cannot
share the noise levels of tokens evenly: a run that was stopped continues bit for bit. But a
denoiser of one's own with dropout draws from torch's generator, which neither the seed sets nor a
state holds."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from ..config import DetectorConfig
from ..errors import InputError, ProcessError, Terminated
from ..progress import progress
from . import trials
from .distributed import processes
from .history import History
from .log import Log
from .optimizer import Optimizer
from .state import TrainingCheckpoint, TrainingState
from .step import CapturedStep

# Losses are read from the device this often; in between the host waits for nothing.
REPORT_EVERY = 20
VALIDATIONS = 10  # in a run


class Loop(ABC):
    """Trains a denoiser and leaves the averaged weights of the lowest validation loss in it.

    A subclass says what a step consists of: :meth:`inputs` names its samples on the host,
    :meth:`loss` computes on the device. Of a step's ``batch`` samples each process computes an
    equal share, ``accumulate`` parts of it one after another where memory is short. On one GPU the
    step is captured once and then replayed.
    """

    unit: str
    """What a sample is called."""
    draws = False
    """Whether there is a :meth:`picture`."""

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

    def picture(self) -> np.ndarray:
        """Held-out samples and what the denoiser makes of them, (H,W,3) uint8."""
        raise NotImplementedError

    def run(self, kept: TrainingCheckpoint | None = None) -> History:
        """Train to the end. On SIGINT, SIGTERM or SIGHUP: write the state, then raise
        KeyboardInterrupt, for the latter Terminated.

        Raises InputError for a loss that is not finite, CheckpointError for a state that does not
        belong to this run, BackendError where the step shall be compiled and cannot, ProcessError
        where another process has ended, after the state of the last complete step was written.
        """
        # A denoiser of one's own need not begin with the same numbers in each process.
        self.processes.equalise([*self.denoiser.parameters(), *self.denoiser.buffers()])
        self.optimizer = Optimizer(self.denoiser, self.config)
        self.best: torch.Tensor | None = None
        self.best_buffers: dict[str, torch.Tensor] = {}
        self.denoiser.train()
        try:
            self._run(kept)
        finally:
            self.optimizer.release()
            self.denoiser.eval()
        return self.history

    def _run(self, kept: TrainingCheckpoint | None) -> None:
        pictures_every = kept and kept.pictures_every
        if pictures_every and not self.draws:
            raise InputError(
                f"pictures are drawn of images by a U-Net, not of {self.unit}s: leave "
                "pictures_every out, or choose a denoiser such as 'unet-small'"
            )
        state = TrainingState(self, kept)
        self.done = start = state.resume()
        self._began = time.monotonic() - self.history.seconds
        step_of = self._first_step() if start == 0 else self.step_function(self.history.compiled)
        self._bar = progress(
            None, self.total * self.batch, "training", self.unit, initial=start * self.batch
        )
        self._log = Log(kept.log if state.writes else None, start)
        with self._bar, self._log, _deferred_signals() as signals:
            for note in self.history.notes if start == 0 else ():
                self._log.note(start, note)
            try:
                self._take_steps(step_of, state, pictures_every, signals)
            except ProcessError as error:
                if not state.writes:
                    raise
                # A step's update follows its exchange: this is the state after `done` steps.
                state.write(self.done, self.total, must=True)
                raise ProcessError(
                    f"{error}; the training is kept in {kept.path} after {self.done} steps"
                ) from None
        # Complete: what follows, other networks and the calibration, may be interrupted too.
        state.write(self.done, self.done, must=bool(signals))
        if signals:
            raise _interruption(signals)
        self.optimizer.exchange(self.optimizer.average if self.best is None else self.best)
        for name, buffer in self.best_buffers.items():
            self.denoiser.get_buffer(name).copy_(buffer)
        self.history.seconds = self.seconds()

    def _first_step(self) -> Callable:
        """The step's function, and how many steps there are, by trials where that is wanted."""
        step_of, seconds = trials.chosen_step(self)
        if self.config.train_budget is not None:
            self.total, self.validations = trials.affordable(self, step_of, seconds)
        return step_of

    def _take_steps(
        self, step_of: Callable, state: TrainingState, pictures_every: int | None,
        signals: list[int],
    ) -> None:  # fmt: skip
        """All that are left, with losses, validations, pictures and states in between."""
        last = self.done - 1
        if self.done and self._judged() and last not in dict(self.history.validation_loss):
            self._validate(last)  # in which another process had ended
        if self._waited_enough():
            return
        for step in range(self.done, self.total):
            interrupted, late = bool(signals), self._late()
            loss = self._run_step(step, step_of, interrupted, late)
            self.done, self.history.seconds = step + 1, self.seconds()
            self._bar.update(self.batch)
            if step % REPORT_EVERY == 0 or self.done == self.total:
                self._report(step, float(loss))
            interrupted, late = self._agreed(step, interrupted, late)
            # An interrupted step is complete, and not taken again: its validation counts.
            if late or self._judged():
                self._validate(step)
            ends = late or self.done == self.total or self._waited_enough()
            if ends and self.history.steps < self.done:
                self._report(step, float(loss))
            if pictures_every and state.writes and (ends or self.done % pictures_every == 0):
                self._draw()
            if interrupted or state.due():
                state.write(self.done, self.total, must=interrupted)
            if interrupted:
                raise _interruption(signals)
            if ends:
                break

    def seconds(self) -> float:
        """Of this training, over all its interruptions."""
        return time.monotonic() - self._began

    def _late(self) -> bool:
        budget = self.config.train_budget
        return budget is not None and self.seconds() >= budget and self.processes.first

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

    def _report(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise self.diverged(step)
        self.history.loss.append((step, loss))
        self._bar.set_postfix(refresh=False, loss=f"{loss:.4f}")
        rate = learning_rate(self.config, step, self.total)
        self._log.write(step, seconds=self.history.seconds, learning_rate=rate, loss=loss)

    def diverged(self, step: int) -> InputError:
        """What is raised where numbers are no longer finite."""
        return InputError(
            f"the training loss became infinite or NaN by step {step}: lower learning_rate (now "
            f"{self.config.learning_rate:g})"
        )

    def _judged(self) -> bool:
        """Whether a validation follows the last step."""
        return self.done == self.total or self.done % max(1, self.total // self.validations) == 0

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """The averaged weights' loss on held-out normals; keeps those of the lowest, and the
        buffers that they were judged with."""
        self.processes.equalise(self.denoiser.buffers())
        with self.averaged():
            loss = self.validation_loss()
        if loss is None:
            return
        history = self.history
        if self.best is None or loss < min(value for _, value in history.validation_loss):
            self.best, history.best_step = self.optimizer.average.clone(), step
            self.best_buffers = {name: b.clone() for name, b in self.denoiser.named_buffers()}
        history.validation_loss.append((step, loss))
        self._log.write(step, seconds=history.seconds, validation_loss=loss)

    @torch.no_grad()
    def _draw(self) -> None:
        """A picture by the averaged weights. Where it cannot be written the training goes on."""
        with self.averaged():
            picture = self.picture()
        try:
            self._log.picture(self.done, picture)
        except InputError as error:
            warnings.warn(
                f"the training goes on without a picture: {error}", RuntimeWarning, stacklevel=2
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The denoiser as it is kept in the end."""
        self.optimizer.exchange(self.optimizer.average)
        self.denoiser.eval()
        try:
            yield
        finally:
            self.denoiser.train()
            self.optimizer.exchange(self.optimizer.average)

    def _waited_enough(self) -> bool:
        """Whether as many validations as ``early_stopping`` says have followed the best one."""
        best = self.history.best_step
        waited = 0 if best is None else sum(s > best for s, _ in self.history.validation_loss)
        return waited >= self.config.early_stopping > 0


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


def _interruption(signals: list[int]) -> KeyboardInterrupt:
    ends = [number for number in signals if number != signal.SIGINT]
    if not ends:
        return KeyboardInterrupt()
    found = Terminated()
    found.signal = ends[0]
    return found


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of breaking into an update.

    Python allows handlers in the main thread only; elsewhere signals act as always, and so do
    those with a handler that was not made by Python, which it could not put back, and those that
    are ignored, as SIGINT is in a shell's background and SIGHUP under nohup.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) not in (None, signal.SIG_IGN)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
