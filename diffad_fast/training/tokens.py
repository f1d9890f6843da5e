"""Training the token MLP on a bank of tokens."""

from __future__ import annotations

import hashlib
import math

import torch

from .. import ops
from ..config import DetectorConfig
from ..denoisers.token_mlp import TokenMLP
from .loop import Loop
from .philox_steps import VALIDATION_STEPS
from .sampling import generator, stratified, visits

# Noise levels are drawn uniformly in log sigma between these: below, a token of unit variance is
# as good as clean, above as good as noise.
SIGMA_RANGE = (0.1, 10.0)
# Different levels in a step, at most. Their embedding costs as much as a third of the network when
# every token has one of its own, and a step has many tokens at nearly the same level anyway.
LEVELS = 32
# Evaluations in a validation: fewer held-out tokens are each seen at several levels.
VALIDATION = 8192


class TokenTrainer(Loop):
    """Trains a token MLP on tokens (M,D) of normals and leaves the averaged weights in it.

    The loss is the squared error of the v-prediction at x = (x0 + sigma noise)/sqrt(1 + sigma^2),
    mean over ``config.token_batch`` tokens, with log sigma uniform. validation: (V,D) held-out
    tokens, which choose the step whose weights are kept.
    """

    unit = "token"

    def __init__(
        self,
        denoiser: TokenMLP,
        tokens: torch.Tensor,
        validation: torch.Tensor,
        config: DetectorConfig,
        device: torch.device,
    ):
        super().__init__(denoiser, config, device, config.token_batch)
        self.tokens, self.validation = tokens.to(self.device), validation.to(self.device)
        mine = self.batch // self.processes.count
        limit = max(1, LEVELS // self.processes.count)
        self.levels = max(n for n in range(1, limit + 1) if mine % n == 0) * self.processes.count

    def inputs(self, step: int) -> tuple[torch.Tensor, ...]:
        first, mine = step * self.batch, self.processes.share_of(self.batch)
        rows, epochs = visits(
            len(self.tokens), first + mine.start, first + mine.stop, self.config.seed
        )
        u = stratified(self.levels, generator(self.config.seed, "level", step))
        return rows, epochs, _log_sigma(u[self.processes.share_of(self.levels)])

    def loss(self, rows, epochs, log_sigma) -> torch.Tensor:
        tokens = self.tokens[rows]
        each = log_sigma.repeat_interleave(len(rows) // len(log_sigma))
        x, target = self._noised(tokens, rows, epochs, each)
        weights, bias = self.denoiser.packed(log_sigma, self.dtype)
        weight = torch.ones_like(each)
        return ops.token_mlp_loss(x, target, weight, weights, bias)

    def _noised(self, x0, rows, step, log_sigma) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's input and the v that it shall say."""
        # Draw 0 belongs to inference.
        noise = ops.philox_normal(
            x0.shape, self.config.seed, draw=rows + 1, step=step, device=x0.device
        )
        sigma = log_sigma.exp()[:, None]
        scale = (1 + sigma**2).rsqrt()
        return scale * (x0 + sigma * noise), scale * (noise - sigma * x0)

    def validation_loss(self) -> float | None:
        """At the same levels and noise each time; tokens evenly from all if there are many."""
        n = len(self.validation)
        if n == 0:
            return None
        # The place of an evaluation names its noise, so that processes can share them out.
        places = torch.arange(VALIDATION)[self.processes.rank :: self.processes.count]
        u = stratified(VALIDATION, generator(self.config.seed, "validation", 0))
        u = u[torch.randperm(VALIDATION, generator=generator(self.config.seed, "validation", 1))]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in places.split(1024):
            rows = part * n // VALIDATION if n > VALIDATION else part % n
            log_sigma = _log_sigma(u[part]).to(self.device)
            step = torch.full_like(part, VALIDATION_STEPS.start)
            x, target = self._noised(
                self.validation[rows.to(self.device)],
                part.to(self.device), step.to(self.device), log_sigma,
            )  # fmt: skip
            weights, bias = self.denoiser.packed(log_sigma)
            loss = ops.token_mlp_loss(x, target, torch.ones_like(log_sigma), weights, bias)
            total += loss.double() * len(part)
        self.processes.add(total)
        return float(total) / VALIDATION

    def identity(self) -> bytes:
        digest = hashlib.sha256()
        for bank in (self.tokens, self.validation):
            digest.update(repr(tuple(bank.shape)).encode())
            digest.update(bank.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.digest()


def _log_sigma(u: torch.Tensor) -> torch.Tensor:
    low, high = map(math.log, SIGMA_RANGE)
    return (low + (high - low) * u).float()
