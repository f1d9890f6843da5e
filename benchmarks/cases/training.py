"""One step of training, from samples in memory to updated weights; samples per second."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..case import OURS, REFERENCE, Case, Contender, random
from ..verify import finite

PLAIN_NOTE = "noise and levels of its own: its loss is checked to be finite"
LEARNING_RATE, DECAY, CLIP, WEIGHT_DECAY = 1e-9, 0.999, 1.0, 1e-4


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    device = torch.device(device_type)
    yield token_case(device, quick, tokens=1024, dim=64, width=256, blocks=3)
    if device_type == "cpu":
        sizes = (
            [("unet-tiny", 64, 8)] if quick else [("unet-tiny", 128, 16), ("unet-small", 256, 16)]
        )
    else:
        sizes = [("unet-small", 256, 64)]
    for denoiser, side, batch in sizes:
        yield image_case(device, denoiser, side, batch)


# ---------------------------------------------------------------------- images


def image_case(device: torch.device, denoiser: str, side: int, batch: int) -> Case:
    images = made_up(batch, side)

    def plain(memory_format: str, **options) -> Contender:
        step = PlainImages(images.to(device), denoiser, memory_format, device, **options).step
        return Contender(
            lambda images: float(step()), memory_format=memory_format, check=finite,
            note=PLAIN_NOTE, dtype="bfloat16" if options.get("mixed") else "float32",
            compiled=False,
        )  # fmt: skip

    def exact(inputs):
        trainer = image_trainer(torch.device("cpu"), denoiser, inputs[0].cpu(), reference=True)
        return trainer(inputs[0])

    contenders = {
        OURS: Contender(
            image_trainer(device, denoiser, images), memory_format="channels_last",
            dtype="bfloat16" if device.type == "cuda" else "float32",
            tolerance=2e-2 if device.type == "cuda" else None,
        ),
        REFERENCE: plain("contiguous"),
        f"{REFERENCE}, channels_last": plain("channels_last"),
    }  # fmt: skip
    if device.type == "cuda":
        contenders[f"{OURS}, torch.compile"] = Contender(
            image_trainer(device, denoiser, images, compiled=True), memory_format="channels_last",
            dtype="bfloat16", tolerance=2e-2,
        )  # fmt: skip
        contenders[f"{REFERENCE}, channels_last, bfloat16"] = plain("channels_last", mixed=True)
        contenders[f"{REFERENCE}, torch.compile, bfloat16"] = plain(
            "channels_last", mixed=True, compiled=True
        )
    return Case(
        "training step",
        f"{denoiser}, batch {batch}, {side}×{side}",
        lambda device: (images,),
        exact,
        contenders,
        tolerance=1e-3,  # the loss in float32, after every step of the timing
        batch=batch,
        unit="image",
        parameters=parameters(_detector(denoiser, images[:1], "cpu").model.denoiser),
        host=True,
        gradients=True,
    )


def image_trainer(
    device, denoiser: str, images: torch.Tensor, reference: bool = False, compiled: bool = False
) -> Callable:
    """A whole step of the library's trainer on the same images each time; gives the loss."""
    from diffad_fast import use_backend

    _, run = image_step(device, denoiser, images, compiled)

    def step(_):
        with use_backend("reference" if reference else "auto"):
            return run()

    return step


def image_step(
    device="cpu", denoiser="unet-small", images=None, compiled=False, side=256, batch=16
) -> tuple:
    """The library's trainer of a U-Net, and a function that runs its first step and gives the loss.

    images: (n,1,side,side) in [0, 1], all of which are a step's; None: ``batch`` made-up ones.
    """
    from diffad_fast.data.images import open_images
    from diffad_fast.training.images import ImageTrainer

    images = made_up(batch, side) if images is None else images
    detector = _detector(denoiser, images, device)
    source = open_images((images * 255).round().to(torch.uint8), images.shape[2:], 1)
    source.load()
    trainer = ImageTrainer(
        detector.model.denoiser.train(), detector.model.representation, source,
        range(len(images)), [], detector.config.replace(batch_size=len(images)), device,
    )  # fmt: skip
    return trainer, _first_step(trainer, compiled)


def _first_step(trainer, compiled: bool = False) -> Callable:
    from diffad_fast.training.optimizer import Optimizer

    trainer.optimizer = Optimizer(trainer.denoiser, trainer.config)
    run = trainer.step_function(compiled)

    def step() -> float:
        trainer.optimizer.set(0, LEARNING_RATE)
        return float(run(*trainer.inputs(0)))

    return step


def made_up(n: int, side: int) -> torch.Tensor:
    return ((random(n, 1, side, side) / 8 + 0.5).clamp(0, 1) * 255).round() / 255


def _detector(denoiser: str, images: torch.Tensor, device, **options):
    from diffad_fast import Detector

    from .detector import fill_zeros

    return fill_zeros(
        Detector(image_size=images.shape[-1], channels=1, preset="fast", denoiser=denoiser,
                 device=device, **options)
    )  # fmt: skip


class PlainLoop:
    """A training step as one writes it: torch's own operators and optimiser, parameter by
    parameter, noise from torch's generator."""

    def __init__(self, module: nn.Module, learning_rate: float = LEARNING_RATE):
        self.module = module.train()
        self.average = copy.deepcopy(module)
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY
        )
        self.updates = 0

    def loss(self, samples: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def step(self, samples: torch.Tensor | None = None) -> torch.Tensor:
        loss = self.loss(self.samples if samples is None else samples)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        decay = min(DECAY, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        with torch.no_grad():
            for p, q in zip(self.average.parameters(), self.module.parameters(), strict=True):
                p.mul_(decay).add_(q, alpha=1 - decay)
        return loss.detach()


class PlainImages(PlainLoop):
    """The same U-Net on the same representation, both by plain PyTorch."""

    def __init__(
        self, samples, denoiser: str, memory_format: str, device, mixed=False, compiled=False,
        learning_rate: float = LEARNING_RATE, **options,
    ):  # fmt: skip
        self.samples, self.mixed, self.device = samples, mixed, torch.device(device)
        detector = _detector(denoiser, samples, self.device, **options)
        name = "contiguous_format" if memory_format == "contiguous" else memory_format
        self.layout = getattr(torch, name)
        self.encode = detector.model.representation.encode
        self.alphas = detector.model.schedule.alphas_cumprod.to(device)
        self.log_sigma = detector.model.schedule.log_sigma.float().to(device)
        self.limit = detector.config.snr_limit
        module = detector.model.denoiser.to(memory_format=self.layout)
        super().__init__(module, learning_rate)
        self.forward = torch.compile(module) if compiled else module

    def loss(self, samples: torch.Tensor) -> torch.Tensor:
        from diffad_fast import reference, use_backend

        with use_backend("reference"):
            x0 = self.encode(samples.to(self.device)).contiguous(memory_format=self.layout)
            t = torch.randint(len(self.alphas), (len(x0),), device=x0.device)
            x_t, target, weight = reference.noised_target(
                x0, t, torch.randn_like(x0), self.alphas, "v_prediction", self.limit
            )
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                prediction = self.forward(x_t, self.log_sigma[t])
            return reference.weighted_mse(prediction.float(), target, weight)

    def step(self, samples: torch.Tensor | None = None) -> torch.Tensor:
        from unittest.mock import patch

        from diffad_fast import use_backend
        from diffad_fast.denoisers import wavelet_unet

        # Plain code keeps what the backward pass needs.
        kept = patch.object(wavelet_unet, "recomputed", lambda then, first, *x: then(first(*x)))
        with use_backend("reference"), kept:
            return super().step(samples)


# ---------------------------------------------------------------------- tokens


def token_step(
    device="cpu", tokens=1024, dim=64, width=256, blocks=3, dtype=torch.float32
) -> tuple:
    """The library's trainer of a token MLP, and a function that runs its first step."""
    from diffad_fast.config import DetectorConfig
    from diffad_fast.training.tokens import TokenTrainer

    module, bank = token_network(dim, width, blocks).to(device, dtype), random(100_000, dim)
    config = DetectorConfig.create(kind="vector", token_batch=tokens)
    trainer = TokenTrainer(module, bank.to(dtype), bank[:0], config, device)
    if dtype == torch.float64:
        trainer.dtype = dtype
    return trainer, _first_step(trainer)


def token_network(dim: int, width: int, blocks: int) -> nn.Module:
    from diffad_fast.denoisers.token_mlp import TokenMLP

    torch.manual_seed(0)
    module = TokenMLP(dim, width, blocks)
    nn.init.normal_(module.linear_out.weight, std=width**-0.5)
    return module


def token_case(
    device: torch.device, quick: bool, tokens: int, dim: int, width: int, blocks: int
) -> Case:
    bank, sizes = random(100_000, dim), (tokens, dim, width, blocks)
    module = token_network(dim, width, blocks)

    def plain(compiled: bool = False, mixed: bool = False) -> Contender:
        loop = PlainTokens(bank.to(device), copy.deepcopy(module).to(device), tokens, mixed)
        if compiled:
            loop.forward = torch.compile(loop.forward)
        return Contender(
            lambda _: float(loop.step()), check=finite, note=PLAIN_NOTE,
            dtype="bfloat16" if mixed else "float32",
        )  # fmt: skip

    _, step = token_step(device, *sizes)
    contenders = {
        OURS: Contender(
            lambda _: step(),
            tolerance=2e-2 if device.type == "cuda" else None,
            dtype="bfloat16" if device.type == "cuda" else "float32",
        ),
        REFERENCE: plain(),
    }
    if not quick:  # compilation takes a minute
        contenders[f"{REFERENCE}, torch.compile"] = plain(compiled=True)
    if device.type == "cuda":
        contenders[f"{REFERENCE}, bfloat16"] = plain(mixed=True)
    return Case(
        "training step",
        f"token-mlp, width {width}, {blocks} blocks, {tokens} tokens of {dim}",
        lambda device: (bank[:1],),
        lambda inputs: token_step("cpu", *sizes, torch.float64)[1](),
        contenders,
        tolerance=1e-3,
        batch=tokens,
        unit="token",
        parameters=parameters(module),
        host=True,
        gradients=True,
    )


class PlainTokens(PlainLoop):
    """The same MLP through its own forward pass, at as many levels in a step as ours has, spread as
    ours are."""

    def __init__(self, bank, module, tokens: int, mixed=False, learning_rate=LEARNING_RATE):
        from diffad_fast.training.tokens import LEVELS

        super().__init__(module, learning_rate)
        levels = max(n for n in range(1, LEVELS + 1) if tokens % n == 0)
        self.shape = tokens // levels, levels
        self.samples, self.mixed, self.forward = bank, mixed, module

    def loss(self, samples: torch.Tensor) -> torch.Tensor:
        from diffad_fast.training.tokens import SIGMA_RANGE

        low, high = map(math.log, SIGMA_RANGE)
        # (n, levels, dim): a level is embedded once, and what it adds is broadcast over n tokens.
        x0 = samples[torch.randint(len(samples), self.shape, device=samples.device)]
        levels = torch.arange(self.shape[1], device=samples.device)
        u = (levels + torch.rand((), device=samples.device)) / self.shape[1]
        log_sigma = low + (high - low) * u
        noise, sigma = torch.randn_like(x0), log_sigma.exp()[:, None]
        scale = (1 + sigma**2).rsqrt()
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.mixed):
            prediction = self.forward(scale * (x0 + sigma * noise), log_sigma)
        return F.mse_loss(prediction.float(), scale * (noise - sigma * x0))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
