"""The batch size of a U-Net's training, from the memory of the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from ..config import DetectorConfig
from ..data.images import Images
from ..representations import WaveletRepresentation
from .distributed import processes
from .images import GPU_SHARE, ImageTrainer
from .optimizer import Optimizer

# Share of the free memory for a step: what decoded images leave, less a tenth for gaps.
STEP_SHARE = 0.9 - GPU_SHARE
# Images in the two steps that tell what one takes.
MEASURED = (4, 8)
# Sixteen times the usual batch: the rule for the learning rate is one for moderate factors.
LARGEST = 256


def with_auto_batch(
    denoiser: nn.Module,
    representation: WaveletRepresentation,
    images: Images,
    fit: Sequence[int],
    config: DetectorConfig,
    device: torch.device,
) -> DetectorConfig:
    """``config`` with the batch size "auto" settled, and the learning rate that belongs to it.

    Arguments as for :class:`ImageTrainer`. On a GPU each part of a step in each process gets the
    largest power of two of images that fits into the memory; elsewhere, where memory does not limit
    a step, the batch is the usual one.
    """
    if device.type != "cuda":
        return config.with_batch(DetectorConfig(kind=config.kind).batch_size)
    together = processes()
    parts = together.count * config.accumulate
    free = STEP_SHARE * torch.cuda.mem_get_info(device)[0]
    given = denoiser, representation, images, fit, config, device
    # In a first step libraries take memory that they keep, as cuBLAS does for each stream.
    _, *peaks = [step_memory(*given, n) for n in (MEASURED[0], *MEASURED)]
    most = max(1, min(LARGEST, len(fit)) // parts)
    return config.with_batch(min(together.gathered(largest(peaks, free, most))) * parts)


def largest(peaks: Sequence[float], free: float, most: int) -> int:
    """The largest power of two, up to ``most``, whose step takes at most ``free`` bytes, from the
    bytes that steps of MEASURED images take; 1 if none does.

    Weights and what belongs to them take the same for every batch, activations grow with it.
    """
    each = (peaks[1] - peaks[0]) / (MEASURED[1] - MEASURED[0])
    fixed = peaks[0] - MEASURED[0] * each
    size = 1
    while 2 * size <= most and fixed + 2 * size * each <= free:
        size *= 2
    return size


def step_memory(denoiser, representation, images, fit, config, device, size: int) -> int:
    """Bytes that a step of ``size`` images in this process takes on the GPU at its peak, beyond
    what is there. The denoiser stays as it is."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    size *= processes().count
    config = config.with_batch(size).replace(accumulate=1)
    some = [fit[i % len(fit)] for i in range(size)]
    network = copy.deepcopy(denoiser).train()
    trial = ImageTrainer(network, representation, images, some, [], config, device)
    trial.optimizer = Optimizer(trial.denoiser, config)
    trial.optimizer.set(0, 0.0)
    float(trial.step_function()(*trial.inputs(0)))
    return torch.cuda.max_memory_allocated(device) - before
