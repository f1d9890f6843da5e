"""Training the token MLP on a bank of tokens."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from ..config import DetectorConfig
from ..denoisers.token_mlp import TokenMLP
from ..errors import InputError
from ..progress import progress
from .ema import EMA
from .loop import History, TrainingCheckpoint, _generator, learning_rate

# Noise levels are drawn uniformly in log sigma between these: below, a token of unit variance is
# as good as clean, above as good as noise.
SIGMA_RANGE = (0.1, 10.0)


def fit_tokens(
    denoiser: TokenMLP,
    tokens: torch.Tensor,
    validation: torch.Tensor,
    config: DetectorConfig,
    device: torch.device,
    kept: TrainingCheckpoint | None = None,
) -> History:
    """Train on tokens (M,D) of normals and leave the averaged weights in ``denoiser``.

    The loss is the squared error of the v-prediction at x = (x0 + sigma noise)/sqrt(1 + sigma^2),
    mean over tokens. validation: (V,D) held-out tokens, for the history.
    """
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
        fused=True,
    )  # fmt: skip
    ema, history = EMA(denoiser, config.ema_decay), History()
    tokens, validation = tokens.to(device), validation.to(device)
    began = time.monotonic()
    denoiser.train()
    for step in progress(range(config.train_steps), None, "training", "step"):
        generator = _generator(config.seed, "tokens", step)
        rows = torch.randint(len(tokens), (config.token_batch,), generator=generator)
        loss = _loss(denoiser, tokens[rows.to(device)], generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.gradient_clip:
            nn.utils.clip_grad_norm_(denoiser.parameters(), config.gradient_clip)
        optimizer.step()
        ema.update(denoiser, step)
        if step % 20 == 0 or step == config.train_steps - 1:
            history.loss.append((step, float(loss.detach())))
            if not math.isfinite(history.loss[-1][1]):
                raise InputError(
                    f"the training loss became {history.loss[-1][1]} at step {step}: lower "
                    f"learning_rate (now {config.learning_rate:g})"
                )
    ema.copy_to(denoiser)
    denoiser.eval()
    if len(validation):
        with torch.no_grad():
            loss = _loss(denoiser, validation, _generator(config.seed, "validation", 0))
        history.validation_loss.append((config.train_steps - 1, float(loss)))
    history.seconds = time.monotonic() - began
    return history


def _loss(denoiser: TokenMLP, x0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    low, high = map(math.log, SIGMA_RANGE)
    n = len(x0)
    # One level from each n-th of the range (Kingma et al. 2021, appendix I.1).
    u = (torch.rand((), generator=generator) + torch.arange(n)) / n
    log_sigma = (low + (high - low) * u).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    sigma = log_sigma.exp()[:, None]
    c = (1 + sigma**2).rsqrt()
    target = c * (noise - sigma * x0)
    return (denoiser(c * (x0 + sigma * noise), log_sigma) - target).square().mean()
