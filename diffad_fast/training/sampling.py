"""Which samples and which noise levels a step has: functions of the seed and the step alone."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


def visits(n: int, start: int, stop: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(position, epoch), int64, of the samples number ``start`` to ``stop`` of a whole run over n:
    every epoch in an order of its own."""
    positions, epochs = [], []
    while start < stop:
        epoch, first = divmod(start, n)
        part = _shuffled(n, seed, epoch)[first : first + stop - start]
        positions.append(part)
        epochs.append(torch.full_like(part, epoch))
        start += len(part)
    return torch.cat(positions), torch.cat(epochs)


@lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch), device="cpu")


def stratified(n: int, generator: torch.Generator) -> torch.Tensor:
    """n numbers in [0, 1), ascending, one in each n-th, all by the same offset: the expectation of
    independent ones with less spread (Kingma et al. 2021, appendix I.1)."""
    offset = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
    u = (offset + torch.arange(n, device="cpu")) / n
    return u.clamp(max=1 - 2**-24)


def generator(seed: int, stream: str, number: int) -> torch.Generator:
    """A generator of its own for every (seed, stream, number)."""
    digest = hashlib.blake2b(f"{seed} {stream} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
