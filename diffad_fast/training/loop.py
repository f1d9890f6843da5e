"""The training loop. Every random choice depends on the seed and the step alone, never on a
generator's history: a run that was stopped continues bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import ops
from ..config import DetectorConfig
from ..data.images import Images
from ..diffusion import NoiseSchedule
from ..errors import CheckpointError, InputError
from ..progress import progress
from . import checkpoint
from .ema import EMA

KIND = "diffad-training"


@dataclass
class TrainingCheckpoint:
    """Where and how often the state of an unfinished training is kept."""

    path: str | os.PathLike
    seconds: float = 300.0
    """Interval between two writes."""
    resume: bool = False
    """Continue from ``path`` if it is there."""


@dataclass
class History:
    """What a training run reports: losses by step, and the seconds that it took in all."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    validation_loss: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    @staticmethod
    def joined(parts: Sequence[History]) -> History:
        """The losses of several networks, one after another, and their seconds together."""
        return History(
            loss=[entry for part in parts for entry in part.loss],
            validation_loss=[entry for part in parts for entry in part.validation_loss],
            seconds=sum(part.seconds for part in parts),
        )


class Trainer:
    """Trains a denoiser on represented images and leaves the averaged weights in it.

    images: decoded collection; ``fit`` and ``validation`` are indices into it.
    ``represent`` maps images (n,C,H,W) on the device to x0.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        represent,
        images: Images,
        fit: Sequence[int],
        validation: Sequence[int],
        config: DetectorConfig,
        device: torch.device,
    ):
        self.denoiser, self.represent, self.images = denoiser, represent, images
        self.fit, self.validation = list(fit), list(validation)
        self.config, self.device = config, device
        self.schedule = NoiseSchedule(config.schedule, config.diffusion_steps)
        self.alphas = self.schedule.alphas_cumprod.to(device)
        self.log_sigma = self.schedule.log_sigma.float().to(device)
        self.optimizer = torch.optim.AdamW(
            denoiser.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
            fused=True,
        )  # fmt: skip
        self.ema = EMA(denoiser, config.ema_decay)
        self.history = History()

    def run(self, kept: TrainingCheckpoint | None = None) -> History:
        """Train to the end. On SIGINT or SIGTERM: write the state, then raise KeyboardInterrupt."""
        config, size = self.config, self.config.batch_size
        start = self._load(kept) if kept and kept.resume and os.path.exists(kept.path) else 0
        total = config.train_steps
        order = self._order(start * size, total * size)
        began = last_write = time.monotonic()
        spent = self.history.seconds
        validate_every = max(1, total // 10)
        self.denoiser.train()
        batches = self.images.batches(size, indices=[index for index, _ in order])
        bar = progress(None, total * size, "training", "image", initial=start * size)
        with bar, _deferred_signals() as stop:
            for step, batch in zip(range(start, total), batches, strict=False):
                epochs = [epoch for _, epoch in order[(step - start) * size :][: len(batch.index)]]
                loss = self._step(step, batch.x, batch.index, torch.tensor(epochs))
                bar.update(size)
                if step % 20 == 0 or step == total - 1:
                    self.history.loss.append((step, float(loss)))
                    bar.set_postfix(refresh=False, loss=f"{self.history.loss[-1][1]:.4f}")
                    if not math.isfinite(self.history.loss[-1][1]):
                        raise InputError(
                            f"the training loss became {float(loss)} at step {step}: lower "
                            f"learning_rate (now {config.learning_rate:g})"
                        )
                self.history.seconds = spent + time.monotonic() - began
                if self.validation and ((step + 1) % validate_every == 0 or step == total - 1):
                    self.history.validation_loss.append((step, self._validate()))
                if kept and (stop or time.monotonic() - last_write >= kept.seconds):
                    self._save(kept, step + 1)
                    last_write = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
        self.ema.copy_to(self.denoiser)
        self.denoiser.eval()
        self.history.seconds = spent + time.monotonic() - began
        return self.history

    def _order(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(data-set index, epoch) of the samples number ``start`` to ``stop`` of the whole run."""
        order, n = [], len(self.fit)
        for epoch in range(start // n, -(-stop // n)):
            shuffled = torch.randperm(n, generator=_generator(self.config.seed, "order", epoch))
            order += [(self.fit[i], epoch) for i in shuffled.tolist()]
        first = start // n * n
        return order[start - first : stop - first]

    def _step(
        self, step: int, images: torch.Tensor, index: torch.Tensor, epoch: torch.Tensor
    ) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        generator = _generator(self.config.seed, "level", step)
        loss = self._loss(images, index, epoch, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.ema.update(self.denoiser, step)
        return loss.detach()

    def _loss(self, images, index, epoch, generator: torch.Generator) -> torch.Tensor:
        """Min-SNR weighted squared error of the prediction, mean over the batch."""
        x0 = self.represent(images.to(self.device))
        n = len(x0)
        # One level from each n-th of the schedule instead of n independent ones: the same
        # expectation with less spread from batch to batch (Kingma et al. 2021, appendix I.1).
        u = (torch.rand((), generator=generator) + torch.arange(n) / n) % 1
        t = (u[torch.randperm(n, generator=generator)] * len(self.schedule)).long()
        t = t.clamp(max=len(self.schedule) - 1).to(self.device)
        # Draw 0 belongs to inference.
        noise = ops.philox_normal(
            x0.shape, self.config.seed, draw=index + 1, step=epoch, device=self.device
        ).contiguous(memory_format=torch.channels_last)
        x_t, target, weight = ops.noised_target(
            x0, t, noise, self.alphas, self.config.prediction_type, self.config.snr_limit
        )
        return ops.weighted_mse(self.denoiser(x_t, self.log_sigma[t]), target, weight)

    @torch.no_grad()
    def _validate(self) -> float:
        """The averaged model's loss on held-out normals, at the same levels and noise each time."""
        current = [p.detach().clone() for p in self.denoiser.parameters()]
        self.ema.copy_to(self.denoiser)
        self.denoiser.eval()
        total, count = 0.0, 0
        for batch in self.images.batches(self.config.batch_size, indices=self.validation):
            generator = _generator(self.config.seed, "validation", count)
            epoch = torch.zeros(len(batch.index), dtype=torch.int64)
            loss = self._loss(batch.x, batch.index, epoch, generator)
            total += float(loss) * len(batch.index)
            count += len(batch.index)
        torch._foreach_copy_(list(self.denoiser.parameters()), current)
        self.denoiser.train()
        return total / max(count, 1)

    def _fingerprint(self) -> str:
        """What a state must share with a run to be continued by it: options and data."""
        digest = hashlib.sha256(self.config.to_json().encode())
        digest.update(json.dumps([self.fit, self.validation, self.images.paths]).encode())
        return digest.hexdigest()

    def _save(self, kept: TrainingCheckpoint, step: int) -> None:
        tensors = {}
        for name, p, average in zip(
            self.ema.names, self.denoiser.parameters(), self.ema.average, strict=True
        ):
            state = self.optimizer.state[p]
            tensors |= {
                f"parameter.{name}": p,
                f"average.{name}": average,
                f"first.{name}": state["exp_avg"],
                f"second.{name}": state["exp_avg_sq"],
            }
        texts = {
            "step": str(step),
            "fingerprint": self._fingerprint(),
            "history": json.dumps(vars(self.history)),
        }
        checkpoint.save(kept.path, KIND, tensors, texts)

    @torch.no_grad()
    def _load(self, kept: TrainingCheckpoint) -> int:
        tensors, texts = checkpoint.load(kept.path, KIND)
        if texts["fingerprint"] != self._fingerprint():
            raise CheckpointError(
                f"{kept.path} was left by a training with other options or other data: repeat "
                "those, or delete it to start anew"
            )
        step = int(texts["step"])
        for name, p, average in zip(
            self.ema.names, self.denoiser.parameters(), self.ema.average, strict=True
        ):
            p.copy_(tensors[f"parameter.{name}"])
            average.copy_(tensors[f"average.{name}"])
            self.optimizer.state[p] = {
                "step": torch.tensor(float(step), device=p.device),
                "exp_avg": torch.empty_like(p).copy_(tensors[f"first.{name}"]),
                "exp_avg_sq": torch.empty_like(p).copy_(tensors[f"second.{name}"]),
            }
        self.history = History(**json.loads(texts["history"]))
        return step


def learning_rate(config: DetectorConfig, step: int) -> float:
    """Linear warm-up, then half a cosine to a hundredth."""
    # A short run warms up for at most a tenth of itself.
    warmup = min(config.warmup_steps, max(1, config.train_steps // 10))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.train_steps - warmup)
    return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def _generator(seed: int, stream: str, number: int) -> torch.Generator:
    """A generator of its own for every (seed, stream, number)."""
    digest = hashlib.blake2b(f"{seed} {stream} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of breaking into the middle of an update.

    Python allows handlers in the main thread only; elsewhere signals act as always.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
