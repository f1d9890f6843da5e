"""The held-out parts of the normals, split by group."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ..config import DetectorConfig
from ..errors import InputError

SMALLEST_SET = 8


class Split(NamedTuple):
    """Indices of the four parts. No group stands in two of them, but that in a fold of a
    cross-fitted calibration statistics and p-values rest on the same ones."""

    fit: list[int]
    validation: list[int]
    statistics: list[int]
    conformal: list[int]
    statistics_groups: list[int]
    """The group of each sample of `statistics`, by a number of its own in all splits of a data
    set."""
    conformal_groups: list[int]


def split_by_group(
    indices: Sequence[int], groups: Sequence[Hashable] | None, config: DetectorConfig
) -> Split:
    """Split ``indices`` by the shares of the configuration, shuffled by its seed.

    groups: one label for every sample of the data set (indexed by ``indices``), None where every
    sample is an object of its own. Every part gets at least one group. Groups with more samples
    than the share of the largest held-out part are held out last: where a few of them are most of a
    data set, most of it would be lost to training.
    Raises InputError with fewer than 8 samples or 4 groups.
    """
    groups = _Groups.of(indices, groups, config.seed)
    shares = (config.validation_share, config.statistics_share, config.conformal_share)
    largest = max(1, max(shares) * len(indices))
    order = np.lexsort((groups.position, groups.size > largest))
    sizes = [max(1, round(len(order) * share)) for share in shares]
    while sum(sizes) > len(order) - 1:
        sizes[sizes.index(max(sizes))] -= 1
    part = np.full(len(order), len(sizes))
    for number, chosen in enumerate(np.split(order, np.cumsum(sizes))[:-1]):
        part[chosen] = number
    (validation, _), *held_out, (fit, _) = (
        groups.members(part == number) for number in range(len(sizes) + 1)
    )
    indices, numbers = zip(*held_out, strict=True)
    return Split(*(found.tolist() for found in (fit, validation, *indices, *numbers)))


def cross_splits(
    indices: Sequence[int], groups: Sequence[Hashable] | None, folds: int, seed: int
) -> list[Split]:
    """The normals in ``folds`` parts of about one size, at most as many as there are groups: of
    each part a split that fits on the others and takes this one for statistics and p-values.

    Arguments otherwise, and what is raised, as for :func:`split_by_group`; nothing validates.
    """
    groups = _Groups.of(indices, groups, seed)
    sizes = [0] * min(folds, len(groups.size))
    part = np.empty(len(groups.size), dtype=np.int64)
    for group in np.lexsort((groups.position, -groups.size)):
        part[group] = smallest = sizes.index(min(sizes))
        sizes[smallest] += groups.size[group]
    result = []
    for number in range(len(sizes)):
        held_out, numbers = (found.tolist() for found in groups.members(part == number))
        rest = groups.members(part != number)[0].tolist()
        result.append(Split(rest, [], held_out, held_out, numbers, numbers))
    return result


class _Groups(NamedTuple):
    """Samples and their groups, each known by a number of its own."""

    indices: np.ndarray
    """(n,) of the samples, ascending."""
    number: np.ndarray
    """(n,) the group of each."""
    size: np.ndarray
    """(groups,) how many samples each has."""
    position: np.ndarray
    """(groups,) uint64, in which order they are chosen: by a hash, so that adding samples moves few
    others to another part."""

    @staticmethod
    def of(indices: Sequence[int], groups: Sequence[Hashable] | None, seed: int) -> _Groups:
        """Raises InputError where there are too few samples or groups."""
        if len(indices) < SMALLEST_SET:
            raise InputError(
                f"{len(indices)} usable normal sample{'' if len(indices) == 1 else 's'}: fit needs "
                f"at least {SMALLEST_SET}, because parts are held out for calibration; cut long "
                "recordings into clips"
            )
        indices = np.sort(np.asarray(indices, dtype=np.int64))
        labels, number = indices, np.arange(len(indices))
        if groups is not None:
            labels = {}
            number = np.array([labels.setdefault(groups[i], len(labels)) for i in indices])
        if len(labels) < 4:
            raise InputError(
                f"the groups put all normals into {len(labels)} object(s): fit needs at least 4, "
                "because whole groups are held out for calibration"
            )
        hashes = (hashlib.sha256(f"{seed} {label}".encode()).digest()[:8] for label in labels)
        position = np.fromiter((int.from_bytes(h, "big") for h in hashes), np.uint64, len(labels))
        return _Groups(indices, number, np.bincount(number), position)

    def members(self, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples of the groups where ``of`` (groups,) is true, and the group of each."""
        mine = of[self.number]
        return self.indices[mine], self.number[mine]
