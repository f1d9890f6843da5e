"""Held-out losses of the library's loop and of a plain one: same network, data, batch and steps."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import torch

from .case import OURS, REFERENCE
from .cases.training import PlainImages, PlainLoop, PlainTokens
from .grid import grid

POINTS = 10
LEARNING_RATE = 1e-3
HAAR_LEVEL = 3


def run(device: torch.device, quick: bool) -> list[dict]:
    """For each network: what was trained, and the curves [(step, loss), ...] of both, by seed."""
    images = _images(64 if quick else 128, quick)
    seeds = (0,) if quick else (0, 1, 2)
    entries = []
    for name, make, steps in (
        ("token-mlp, width 256, 3 blocks, 1024 tokens", _tokens, 60 if quick else 400),
        # The network of 256² on a quarter of the positions.
        (f"{_denoiser(quick)}, Haar level {HAAR_LEVEL}, batch 16", _unet, 10 if quick else 80),
    ):
        curves: dict[str, list] = {OURS: [], REFERENCE: []}
        for seed in seeds:
            print(f"  curves of {name}, seed {seed}", file=sys.stderr, flush=True)
            for contender, curve in make(images, device, steps, seed, quick).items():
                curves[contender].append(curve)
        entries.append({"name": name, "steps": steps, "curves": curves})
    return entries


def lines(entries: list[dict]) -> list[str]:
    """The Markdown table of final losses."""
    text = [
        "## Held-out loss", "",
        "Of the averaged weights after the last step, at the same noise and levels for both: "
        "median over seeds, and the range of the ratio ours / reference.", "",
    ]  # fmt: skip
    table = []
    for entry in entries:
        ours, other = ([c[-1][1] for c in entry["curves"][n]] for n in (OURS, REFERENCE))
        ratios = [a / b for a, b in zip(ours, other, strict=True)]
        table.append([
            entry["name"], str(entry["steps"]), str(len(ours)), f"{statistics.median(ours):.4f}",
            f"{statistics.median(other):.4f}", f"{min(ratios):.3f} to {max(ratios):.3f}",
        ])  # fmt: skip
    return text + grid(["network", "steps", "seeds", "ours", "reference", "ratio"], table)


def _images(side: int, quick: bool):
    """Normal images of the demo, decoded."""
    from diffad_fast.data.demo import SIZES, write_data
    from diffad_fast.data.images import open_images
    from diffad_fast.data.mvtec import mvtec_train

    root = Path("out") / "benchmarks" / f"curves-{side}{'-quick' if quick else ''}"
    sizes = {**SIZES, "side": side, "train": 60 if quick else 200, "test": 2}
    write_data(root, root.with_name(f"{root.name}-null"), texture="brick", seed=0, **sizes)
    images = open_images(mvtec_train(root), (side, side), 1)
    images.load()
    return images


def _config(steps: int, seed: int, **options):
    from diffad_fast.config import DetectorConfig

    return DetectorConfig.create(
        train_steps=steps, seed=seed, learning_rate=LEARNING_RATE, train_dtype="float32", **options
    )


def _tokens(images, device, steps: int, seed: int, quick: bool) -> dict[str, list]:
    from diffad_fast import ops
    from diffad_fast.denoisers.token_mlp import TokenMLP
    from diffad_fast.training.tokens import TokenTrainer

    x = torch.cat([batch.x for batch in images.batches(64)])
    tokens = ops.haar_pack(x, 3).flatten(2).transpose(1, 2).flatten(0, 1)
    tokens = (tokens - tokens.mean(0)) / tokens.std(0).clamp(min=1e-3)
    cut = len(tokens) * 9 // 10
    fit, held_out = tokens[:cut].to(device), tokens[cut:].to(device)
    config = _config(steps, seed, kind="vector")

    def create():
        torch.manual_seed(seed)
        return TokenMLP(tokens.shape[1]).to(device)

    trainer = TokenTrainer(create(), fit, held_out, config, device)
    plain = PlainTokens(fit, create(), config.token_batch, learning_rate=LEARNING_RATE)
    judge = TokenTrainer(plain.average, fit, held_out, config, device)
    history = trainer.run()
    return {OURS: history.validation_loss, REFERENCE: _plain(plain, judge, config)}


def _denoiser(quick: bool) -> str:
    return "unet-tiny" if quick else "unet-small"


def _unet(images, device, steps: int, seed: int, quick: bool) -> dict[str, list]:
    from diffad_fast import Detector
    from diffad_fast.training.images import ImageTrainer

    n = len(images.load())
    fit, held_out = range(n * 9 // 10), range(n * 9 // 10, n)
    x = torch.cat([batch.x for batch in images.batches(64)])
    options = {"denoiser": _denoiser(quick), "haar_level": HAAR_LEVEL, "preset": "fast"}
    config = _config(steps, seed, image_size=x.shape[-1], **options)

    def detector():
        return Detector(image_size=x.shape[-1], channels=1, seed=seed, device=device, **options)

    def trainer(found):
        model = found.model
        given = model.denoiser, model.representation, images, fit, held_out
        return ImageTrainer(*given, config, device)

    ours = detector()
    ours.model.representation.fit([x[: len(fit)].to(device)])
    plain = PlainImages(
        x[: len(fit)].to(device), options["denoiser"], "contiguous", device,
        learning_rate=LEARNING_RATE, haar_level=HAAR_LEVEL,
    )  # fmt: skip
    # The weights that ours starts from; the case's own are made up.
    plain.module.load_state_dict(ours.model.denoiser.state_dict())
    plain.average.load_state_dict(ours.model.denoiser.state_dict())
    plain.encode = ours.model.representation.encode
    other = detector()
    other.model.representation.load_state_dict(ours.model.representation.state_dict())
    other.model.denoiser = plain.average
    judge = trainer(other)
    history = trainer(ours).run()
    return {OURS: history.validation_loss, REFERENCE: _plain(plain, judge, config)}


def _plain(loop: PlainLoop, judge, config) -> list[tuple[int, float]]:
    """Train the plain loop by the same schedule and judge its average by our held-out loss."""
    from diffad_fast.training.loop import learning_rate

    torch.manual_seed(config.seed)
    curve, samples = [], loop.samples
    order = iter(())
    for step in range(config.train_steps):
        for group in loop.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, config.train_steps)
        if isinstance(loop, PlainImages):
            batch = next(order, None)
            if batch is None or len(batch) < config.batch_size:
                order = iter(torch.randperm(len(samples)).split(config.batch_size))
                batch = next(order)
            loss = loop.step(samples[batch])
        else:
            loss = loop.step()
        if not math.isfinite(float(loss)):
            raise RuntimeError(f"the plain loop diverged at step {step}")
        if (step + 1) % max(1, config.train_steps // POINTS) == 0:
            loop.average.eval()
            with torch.no_grad():
                curve.append((step, judge.validation_loss()))
    return curve
