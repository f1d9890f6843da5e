"""Distances to nearest neighbours, by a matrix product that finds them."""

from __future__ import annotations

import torch

# Numbers that are held at a time for each of a few tensors: a million is 8 MiB, in a CPU's caches.
TOGETHER = 1 << 20


def nearest_distances(x: torch.Tensor, sample: torch.Tensor, count: int) -> torch.Tensor:
    """As ``ops.nearest_distances``."""
    # A program that is exported takes batches of any length.
    numbers = max(len(sample), count * x.shape[1])  # of a row
    most = TOGETHER if x.device.type == "cpu" else 16 * TOGETHER  # a GPU is to be filled
    together = max(1, most // numbers)
    parts = [x] if torch.compiler.is_exporting() else x.split(together)
    sample = sample.double()
    found = []
    for rows in parts:
        rows = rows.double()
        rough = torch.cdist(rows, sample, compute_mode="use_mm_for_euclid_dist")
        # The product leaves |a|^2 - 2 ab + |b|^2, which cancels where a point is near, and what is
        # left depends on how many rows it has: the distances are those of the differences.
        others = sample[rough.topk(count, largest=False).indices]
        distances = torch.linalg.vector_norm(rows[:, None] - others, dim=-1)
        found.append(distances.sort(dim=1).values)
    return torch.cat(found)
