"""AnoDDPM, a public diffusion detector of images, run from a clone of its authors' code.

Wyatt, Leach, Schmon and Willcocks, "AnoDDPM: Anomaly Detection with Denoising Diffusion
Probabilistic Models using Simplex Noise", CVPR Workshops 2022
(https://github.com/Julian-Wyatt/AnoDDPM): a U-Net on pixels, trained with simplex noise, takes an
image from step 200 of 1,000 back to a normal one.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from .clones import imported

NAME, REPOSITORY = "AnoDDPM", "github.com/Julian-Wyatt/AnoDDPM"
# Of its test_args/args28.json, the model with simplex noise, at 256 x 256 pixels and batch 1, which
# is the only one that its simplex noise takes.
STEPS, WIDTH = 300_100, 128
RECIPE = {"train_start": True, "sample_distance": 800}
# Of its detection.py.
DISTANCE = 200
# It has no score of an image: ours is taken, the mean of the highest of the map.
TOP = 0.01


def detect(
    clone: Path, train: np.ndarray, test: np.ndarray, seed: int, steps: int, width: int
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Train on ``train`` for ``steps`` steps a U-Net of ``width`` channels; maps (N,H,W), scores
    (N,) and costs of ``test``. Images are (N,C,H,W) float32 in [0,1], square."""
    diffusion, network = (
        imported(clone, name, REPOSITORY) for name in ("GaussianDiffusion", "UNet")
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    train, test = (torch.from_numpy(images) * 2 - 1 for images in (train, test))
    channels, side = train.shape[1], train.shape[-1]
    model = network.UNetModel(side, width, n_heads=2, in_channels=channels)
    averaged = copy.deepcopy(model)
    process = diffusion.GaussianDiffusionModel(
        [side, side], diffusion.get_beta_schedule(1000, "linear"), img_channels=channels,
        loss_type="l2", loss_weight="none", noise="simplex",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    # An average over as large a part of a shorter training.
    decay = 0.9999 ** (STEPS / steps)
    began = time.perf_counter()
    for step in range(steps):
        if step % len(train) == 0:
            order = torch.randperm(len(train))
        image = train[order[step % len(train)]][None]
        loss, _ = process.p_loss(model, image, RECIPE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        network.update_ema_params(averaged, model, decay)
        if (step + 1) % 500 == 0:
            print(f"{NAME}: step {step + 1} of {steps}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    averaged.eval()
    maps, times = [], []
    for image in test:
        began = time.perf_counter()
        back = process.forward_backward(
            averaged, image[None], see_whole_sequence=None, t_distance=DISTANCE,
            denoise_fn="noise_fn",
        )  # fmt: skip
        maps.append((image - back[0]).square().mean(dim=0))
        times.append(time.perf_counter() - began)
        if len(maps) % 20 == 0:
            print(f"{NAME}: image {len(maps)} of {len(test)}", file=sys.stderr, flush=True)
    found = torch.stack(maps)
    highest = found.flatten(1).topk(max(1, round(TOP * side * side)), dim=1).values
    latency = statistics.median(times) * 1e3
    costs = {"fit_seconds": seconds, "latency_ms": latency}
    return found.numpy(), highest.mean(dim=1).double().numpy(), costs
