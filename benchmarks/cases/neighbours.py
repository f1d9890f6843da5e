from __future__ import annotations

from collections.abc import Iterator

import torch

from ..case import Case, Contender, on, operator_case, random

SAMPLE, COUNT = 4096, 6


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    sizes = ((256, 32),) if quick else ((256, 32), (1, 32), (256, 384))
    for rows, size in sizes:
        yield _case(rows, size)


def _case(rows: int, size: int) -> Case:
    return operator_case(
        "nearest_distances",
        f"{COUNT} of {SAMPLE} to {rows} {'rows' if rows > 1 else 'row'} of {size}",
        lambda device: on(device, *random(rows + SAMPLE, size).split((rows, SAMPLE))),
        lambda functions, *inputs: functions.nearest_distances(*inputs, COUNT),
        formats=False,
        peers={
            "torch.cdist and topk": Contender(
                by_cdist,
                tolerance=1e-4,
                graph=True,
                note="in float32, which cancels for the nearest",
            ),
            "scikit-learn, brute": _by_scikit_learn("brute"),
            "scikit-learn, auto": _by_scikit_learn("auto"),
        },
        bytes=4 * (rows + SAMPLE) * size + 8 * rows * COUNT,
        flops=2 * rows * SAMPLE * size,
        batch=rows,
        unit="row",
    )


def by_cdist(x, sample):
    return torch.cdist(x, sample).topk(COUNT, largest=False).values


def _by_scikit_learn(algorithm: str) -> Contender:
    """Fitted before; on all cores, as ours."""

    def prepare(inputs):
        from sklearn.neighbors import NearestNeighbors

        x, sample = (tensor.numpy() for tensor in inputs)
        search = NearestNeighbors(n_neighbors=COUNT, algorithm=algorithm, n_jobs=-1)
        return search.fit(sample), x

    def run(search, x):
        return torch.from_numpy(search.kneighbors(x)[0])

    return Contender(
        run, prepare, tolerance=1e-4, cpu_only=True, note="fitted before, on all cores"
    )
