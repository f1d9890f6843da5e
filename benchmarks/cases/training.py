"""One step of training: forward, backward, clipping, AdamW, moving average; images per second."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..case import OURS, REFERENCE, Case, Contender, random


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    side, batch = (128, 16) if device_type == "cpu" else (256, 64)
    if quick and device_type == "cpu":
        side, batch = 64, 8
    for denoiser in ("unet-tiny", "unet-small")[: 1 if quick else None]:
        yield _case(torch.device(device_type), denoiser, side, batch)


def _case(device: torch.device, denoiser: str, side: int, batch: int) -> Case:
    from diffad_fast import use_backend

    images = (random(batch, 1, side, side) / 8 + 0.5).clamp(0, 1)

    def contender(memory_format: str, backend: str) -> Contender:
        step = _step(device, denoiser, side, memory_format, torch.float32)

        def run(given):
            with use_backend(backend):
                return step(given)

        return Contender(run, memory_format=memory_format)

    def exact(inputs):
        with use_backend("reference"):
            step = _step(torch.device("cpu"), denoiser, side, "contiguous", torch.float64)
            return step(inputs[0].double())

    with FlopCounterMode(display=False) as counter, use_backend("reference"):
        _step(torch.device("cpu"), denoiser, side, "contiguous", torch.float32)(images[:1])
    return Case(
        "training step",
        f"{denoiser}, batch {batch}, {side}×{side}",
        lambda device: (images,),
        exact,
        {
            OURS: contender("channels_last", "auto"),
            REFERENCE: contender("contiguous", "reference"),
            f"{REFERENCE}, channels_last": contender("channels_last", "reference"),
        },
        flops=batch * counter.get_total_flops(),
        tolerance=1e-3,  # the loss in float32, after every step of the timing
        batch=batch,
        unit="image",
        host=True,
        gradients=True,
    )


def _step(device, denoiser, side, memory_format, dtype):
    """A function (images) -> loss that does the whole step of the library's own trainer.

    The learning rate is so small that the loss stays what it was at the start, at any number of
    steps: every contender can be held against the same exact value.
    """
    from diffad_fast import Detector
    from diffad_fast.training.loop import Trainer

    from .detector import fill_zeros

    detector = fill_zeros(
        Detector(image_size=side, channels=1, preset="fast", denoiser=denoiser,
                 learning_rate=1e-9, device=device)
    )  # fmt: skip
    layout = getattr(torch, "contiguous_format" if memory_format == "contiguous" else memory_format)
    module: nn.Module = detector.model.denoiser.to(memory_format=layout).to(dtype).train()
    representation = detector.model.representation.to(dtype)
    trainer = Trainer(
        module, lambda x: representation.encode(x).contiguous(memory_format=layout), None, [], [],
        detector.config, device,
    )  # fmt: skip

    def step(images):
        index = torch.arange(len(images))
        loss = trainer._step(0, images, index, torch.zeros_like(index))
        return float(loss)  # waits for the device, as a loop that reports its loss does

    return step
