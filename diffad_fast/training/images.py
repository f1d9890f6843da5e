"""Training on represented images."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..config import DetectorConfig
from ..data.images import Images
from ..diffusion import NoiseSchedule
from ..errors import InputError
from ..representations import WaveletRepresentation
from .augment import augmented
from .history import History
from .loop import Loop
from .philox_steps import VALIDATION_STEPS
from .sampling import generator, stratified, visits
from .state import TrainingCheckpoint

# Evaluations in a validation, if there are fewer held-out images each at several levels.
VALIDATION = 64
# Share of a GPU's free memory that decoded images may take; bytes of a host's.
GPU_SHARE, HOST_BYTES = 0.4, 4 << 30
IDENTIFYING = 32  # images that tell one data set from another
PICTURES = 4  # held-out images in a picture


class ImageTrainer(Loop):
    """Trains a denoiser on the coefficients of images and leaves the averaged weights in it.

    images: a loaded collection; ``fit`` and ``validation`` are indices into it. They lie on the
    device, in 8 bits where those hold them, if they fit there; otherwise they are read beside the
    computing. ``draw`` maps images (n,C,H,W) in [0, 1] on the device to rows of pictures
    (rows,n,C,H,W) in [0, 1], for a picture of the held-out ones.
    """

    unit = "image"

    def __init__(
        self,
        denoiser: nn.Module,
        representation: WaveletRepresentation,
        images: Images,
        fit: Sequence[int],
        validation: Sequence[int],
        config: DetectorConfig,
        device,
        draw: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__(denoiser, config, device, config.batch_size, config.accumulate)
        self.representation, self.images = representation, images
        self.fit, self.validation = torch.tensor(list(fit)), torch.tensor(list(validation))
        self.schedule = NoiseSchedule(config.schedule, config.diffusion_steps)
        self.alphas = self.schedule.alphas_cumprod.to(self.device)
        self.log_sigma = self.schedule.log_sigma.float().to(self.device)
        self.resident = resident_images(images, self.fit, self.device)
        self._stream: Iterator[torch.Tensor] | None = None
        self._next = -1
        # Those that were unusable from the start.
        self._skipped = images.length - len(images.load())
        self._draw_rows, self.draws = draw, draw is not None

    def run(self, kept: TrainingCheckpoint | None = None) -> History:
        try:
            return super().run(kept)
        finally:
            self._stream, self._next = None, -1  # threads that decode ahead end with it

    def inputs(self, step: int) -> tuple[torch.Tensor, ...]:
        positions, epochs = visits(
            len(self.fit), step * self.batch, (step + 1) * self.batch, self.config.seed
        )
        random = generator(self.config.seed, "level", step)
        u = stratified(self.batch, random)[torch.randperm(self.batch, generator=random)]
        mine = self.processes.share_of(self.batch)
        images = positions[mine] if self.resident is not None else self._streamed(step)
        return images, self.fit[positions[mine]], epochs[mine], self._timestep(u[mine])

    def _timestep(self, u: torch.Tensor) -> torch.Tensor:
        return (u * len(self.schedule)).long()

    def _streamed(self, step: int) -> torch.Tensor:
        """This process's images of a step, decoded ahead as long as steps follow each other."""
        if step != self._next:
            mine = self.processes.share_of(self.batch)

            def order() -> Iterator[int]:
                for k in count(step):
                    first = k * self.batch
                    start, stop = first + mine.start, first + mine.stop
                    positions, _ = visits(len(self.fit), start, stop, self.config.seed)
                    for index in self.fit[positions].tolist():
                        # Before another image takes the place of one that was left out.
                        if len(self.images.skipped) > self._skipped:
                            raise _lost(self.images)
                        yield index

            size = mine.stop - mine.start
            self._stream = (batch.x for batch in self.images.batches(size, indices=order()))
        self._next = step + 1
        x = next(self._stream)
        return x.pin_memory() if self.device.type == "cuda" else x

    def loss(self, images, index, epoch, t) -> torch.Tensor:
        """Min-SNR weighted squared error of the prediction, mean over the batch."""
        x = images if self.resident is None else self.resident[images]
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        x = augmented(x, self.config.augment, self.config.seed, index, epoch)
        return self._loss(x, index, epoch, t)

    def _loss(self, images, index, epoch, t) -> torch.Tensor:
        config = self.config
        # Draw 0 belongs to inference.
        noise = ops.philox_normal(
            self.representation.shape(images.shape), config.seed, draw=index + 1, step=epoch,
            device=self.device,
        )  # fmt: skip
        x_t, target, weight = self.representation.noised_target(
            images, t, noise, self.alphas, config.prediction_type, config.snr_limit
        )
        # Without its cache, which keeps a cast weight until the outermost autocast is left: within
        # another one, or in a CUDA graph, past the weight's next change.
        with torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        ):
            prediction = self.denoiser(x_t, self.log_sigma[t])
        return ops.weighted_mse(prediction.float(), target, weight)

    def validation_loss(self) -> float | None:
        """At the same levels and noise each time; held-out images are seen in turn."""
        n = len(self.validation)
        if n == 0:
            return None
        repeats = max(1, math.ceil(VALIDATION / n))
        u = stratified(n * repeats, generator(self.config.seed, "validation", 0))
        u = u[torch.randperm(len(u), generator=generator(self.config.seed, "validation", 1))]
        own = range(n)[self.processes.rank :: self.processes.count]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        size = self.config.batch_size // (self.processes.count * self.accumulate)
        first = 0
        for batch in self.images.batches(size, indices=self.validation[list(own)].tolist()):
            places = torch.tensor(own[first : first + len(batch.index)])
            first += len(places)
            x, index = batch.x.to(self.device), batch.index.to(self.device)
            together = max(1, size // len(places))  # of few images, several levels at once
            for k in range(0, repeats, together):
                turns = range(k, min(k + together, repeats))
                t = self._timestep(torch.cat([u[places + turn * n] for turn in turns]))
                steps = torch.tensor([VALIDATION_STEPS[turn] for turn in turns])
                steps = steps.repeat_interleave(len(places)).to(self.device)
                images, indices = x.repeat(len(turns), 1, 1, 1), index.repeat(len(turns))
                total += self._loss(images, indices, steps, t.to(self.device)).double() * len(t)
        if first < len(own):
            raise _lost(self.images)
        self.processes.add(total)
        return float(total) / (n * repeats)

    def picture(self) -> np.ndarray:
        """The first held-out images and what ``draw`` makes of them, with white lines between."""
        some = (self.validation if len(self.validation) else self.fit)[:PICTURES]
        x = next(iter(self.images.batches(len(some), indices=some.tolist()))).x
        tiles = F.pad(self._draw_rows(x.to(self.device)).float().cpu(), (0, 2, 0, 2), value=1.0)
        rows, n, channels, height, width = tiles.shape
        tiles = tiles.permute(0, 3, 1, 4, 2).reshape(rows * height, n * width, channels)
        return (tiles.expand(-1, -1, 3) * 255).round().to(torch.uint8).numpy()

    def identity(self) -> bytes:
        lists = [self.fit.tolist(), self.validation.tolist(), self.images.paths]
        digest = hashlib.sha256(json.dumps(lists).encode())
        # A few of the images: other data under the same names is other data.
        some = self.fit[:: -(-len(self.fit) // IDENTIFYING)].tolist()
        for batch in self.images.batches(len(some), indices=some):
            digest.update(batch.x.contiguous().numpy().tobytes())
        return digest.digest()


def resident_images(
    images: Images, indices: torch.Tensor, device: torch.device
) -> torch.Tensor | None:
    """The images (n,C,H,W) at ``indices`` on the device, uint8 if that loses nothing, else float32;
    None where they do not fit. Raises InputError for one that can no longer be read."""
    limit = HOST_BYTES
    if device.type == "cuda":
        limit = GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    store, taken = None, 0
    for batch in images.batches(64, indices=indices.tolist()):
        x = batch.x
        eight_bit = (x * 255).round().to(torch.uint8)
        exact = torch.equal(eight_bit.float() / 255, x)
        if store is None or (store.dtype == torch.uint8 and not exact):
            dtype = torch.uint8 if exact and store is None else torch.float32
            size = 1 if dtype == torch.uint8 else 4
            if len(indices) * x[0].numel() * size > limit:
                return None
            old, store = (
                store,
                torch.empty((len(indices), *x.shape[1:]), dtype=dtype, device=device),
            )
            if old is not None:
                store[:taken] = old[:taken].float() / 255
        store[taken : taken + len(x)] = eight_bit if store.dtype == torch.uint8 else x
        taken += len(x)
    if taken < len(indices):
        raise _lost(images)
    return store


def _lost(images: Images) -> InputError:
    _, reason = images.skipped[-1]
    return InputError(f"an image that could be read before the training no longer can: {reason}")
