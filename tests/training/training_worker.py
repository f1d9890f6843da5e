"""Trainings small enough for tests, run in processes of their own.

Processes come from a fork server that has imported everything: a start takes milliseconds.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch

import diffad_fast as daf
from diffad_fast.config import DetectorConfig
from diffad_fast.data.images import open_images
from diffad_fast.denoisers.token_mlp import TokenMLP
from diffad_fast.errors import InputError
from diffad_fast.representations import WaveletRepresentation
from diffad_fast.training.distributed import processes, torchrun_group
from diffad_fast.training.images import ImageTrainer
from diffad_fast.training.state import TrainingCheckpoint
from diffad_fast.training.tokens import TokenTrainer

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


class Pixelwise(torch.nn.Module):
    """A denoiser of images with 4-d weights and, in the statistics of its normalisation, something
    that a resumed training has to remember beside them."""

    def __init__(self, normalisation):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8) if normalisation else torch.nn.Identity(),
            torch.nn.SiLU(),
            torch.nn.Conv2d(8, 1, 3, padding=1),
        )

    def forward(self, x, log_sigma):
        return self.layers(x + 0.1 * log_sigma[:, None, None, None])


def pixels():
    """A representation that changes nothing."""
    representation = WaveletRepresentation(1, 0)
    representation.mean.zero_()
    representation.deviation.fill_(1)
    return representation


def pictures(n=20, seed=0):
    return (np.random.default_rng(seed).random((n, 16, 16)) * 255).astype(np.uint8)


def image_trainer(
    module=None, arrays=None, n=20, normalisation=True, device="cpu", draw=None, **options
):
    options = {
        "image_size": 16, "denoiser": "unet-tiny", "train_steps": 24, "batch_size": 4,
        "warmup_steps": 3,
    } | options  # fmt: skip
    images = open_images(pictures(n) if arrays is None else arrays, (16, 16), 1)
    images.load()
    torch.manual_seed(0)
    module = Pixelwise(normalisation) if module is None else module
    config = DetectorConfig.create(**options)
    module = module.to(device)
    representation = pixels().to(device)
    fit, held_out = range(n - 4), range(n - 4, n)
    return ImageTrainer(module, representation, images, fit, held_out, config, device, draw)


def token_trainer(device="cpu", **options):
    options = {"kind": "vector", "train_steps": 60, "token_batch": 64, "warmup_steps": 3} | options
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(300, 6, generator=generator)
    torch.manual_seed(0)
    config = DetectorConfig.create(**options)
    return TokenTrainer(TokenMLP(6, 32, 2).to(device), bank[:250], bank[250:], config, device)


def unseeded_trainer(**options):
    """Of a denoiser with other numbers, trained and frozen, in each process."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    module = Pixelwise(normalisation=True)
    module.layers[3].bias.requires_grad_(False)
    return image_trainer(module, **options)


def sentence(call, *arguments):
    """Of the InputError that it raises; "" where it raises none."""
    try:
        call(*arguments)
    except InputError as error:
        return str(error)
    return ""


def different_samples(state, scored, folders):
    """What processes say of samples that are their own: rows to fit on, rows and files to score."""
    rank, rows = processes().rank, np.random.default_rng(0).normal(size=(60, 3))
    made = daf.Detector(
        "vector", train_steps=2, token_width=16, token_blocks=1, token_batch=16, device="cpu"
    )
    other = rows + (np.arange(60) == 59)[:, None] * rank
    told = [sentence(made.fit, own) for own in (rows[: 60 - 20 * rank], other, rows)]
    told += [sentence(made.score, own) for own in (rows[: 60 - 20 * rank], other, rows)]
    detector = daf.load(scored, device="cpu")
    return told + [sentence(detector.score, sorted(folders[rank].iterdir()))]


def evaluated(state, scored, data, report):
    """Figures of clips, whose report the first process writes, and what a score has of them."""
    detector, first = daf.load(scored, device="cpu"), processes().first
    figures = detector.evaluate(data, report=report if first else None)
    sizes = {True: 2, False: 3}  # the first one's counts
    score = detector.score(data / "test", maps=not first, batch_size=sizes[first])
    maps = None if score.map is None else score.map.shape
    return figures, score.score.tolist(), score.index.tolist(), score.skipped, maps


CALLS = {"different samples": different_samples, "evaluated": evaluated}
TRAINERS = {"image": image_trainer, "token": token_trainer, "unseeded": unseeded_trainer}


def train(kind, state, out, options, seconds=0.0, environment=None):
    """Resume or begin, and leave (weights, history) in ``out``, or what one of the CALLS gives; the
    reason of a failure instead."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the server of forks ignores under nohup
    os.environ.update(environment or {})
    sys.stderr = open(os.devnull, "w")
    try:
        with torchrun_group("cpu", timeout=30.0):
            if kind in CALLS:
                torch.save(CALLS[kind](state, **options), out)
                return
            trainer = TRAINERS[kind](**options)
            kept = state and TrainingCheckpoint(state, seconds=seconds, resume=True)
            history = trainer.run(kept)
        torch.save((trainer.denoiser.state_dict(), vars(history)), out)
    except BaseException as error:
        Path(f"{out}.error").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def start(*arguments, **options):
    process = context.Process(target=train, args=arguments, kwargs=options)
    process.start()
    return process


def wait_for(path, process, seconds=60.0):
    """Until ``path`` is there; what the process says where it ends without."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive() and time.monotonic() < deadline, "no state was written"
        time.sleep(0.002)


def finished(kind, state, out, options, **more):
    """(weights, history) of a training in a process of its own."""
    process = start(kind, state, out, options, **more)
    process.join(60)
    assert process.exitcode == 0, Path(f"{out}.error").read_text()
    return torch.load(out)


def start_joined(count, kind, state, folder, options):
    """Processes that train together; number k leaves its result in ``folder``/k."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            kind, state, folder / str(rank), options,
            environment={
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for rank in range(count)
    ]  # fmt: skip


def assert_same(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name
