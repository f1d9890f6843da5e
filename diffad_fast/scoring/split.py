"""The held-out parts of the normals, split by group."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import NamedTuple

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
    conformal_groups: list[int]
    """The group of each sample of the conformal part, by a number of its own in all splits of a
    data set."""


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
    members = _members(indices, groups)
    shares = (config.validation_share, config.statistics_share, config.conformal_share)
    largest = max(1, max(shares) * len(indices))
    order = sorted(members, key=lambda g: (len(members[g]) > largest, _position(g, config.seed)))
    n = len(order)
    sizes = [max(1, round(n * share)) for share in shares]
    while sum(sizes) > n - 1:
        sizes[sizes.index(max(sizes))] -= 1
    parts, start = [], 0
    for size in sizes:
        parts.append(sorted(i for group in order[start : start + size] for i in members[group]))
        start += size
    fit = sorted(i for group in order[start:] for i in members[group])
    return Split(fit, *parts, _numbered(parts[-1], members))


def cross_splits(
    indices: Sequence[int], groups: Sequence[Hashable] | None, folds: int, seed: int
) -> list[Split]:
    """The normals in ``folds`` parts of about one size, at most as many as there are groups: of
    each part a split that fits on the others and takes this one for statistics and p-values.

    Arguments otherwise, and what is raised, as for :func:`split_by_group`; nothing validates.
    """
    members = _members(indices, groups)
    parts: list[list[Hashable]] = [[] for _ in range(min(folds, len(members)))]
    sizes = [0] * len(parts)
    for group in sorted(members, key=lambda g: (-len(members[g]), _position(g, seed))):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(group)
        sizes[smallest] += len(members[group])
    result = []
    for part in parts:
        held_out = sorted(i for group in part for i in members[group])
        rest = sorted(set(indices) - set(held_out))
        result.append(Split(rest, [], held_out, held_out, _numbered(held_out, members)))
    return result


def _members(
    indices: Sequence[int], groups: Sequence[Hashable] | None
) -> dict[Hashable, list[int]]:
    """The samples of each group; raises InputError where they are too few."""
    label = (lambda i: i) if groups is None else (lambda i: groups[i])
    members: dict[Hashable, list[int]] = {}
    for i in indices:
        members.setdefault(label(i), []).append(i)
    if len(indices) < SMALLEST_SET:
        raise InputError(
            f"{len(indices)} usable normal sample{'' if len(indices) == 1 else 's'}: fit needs "
            f"at least {SMALLEST_SET}, because parts are held out for calibration; cut long "
            "recordings into clips"
        )
    if len(members) < 4:
        raise InputError(
            f"the groups put all normals into {len(members)} object(s): fit needs at least 4, "
            "because whole groups are held out for calibration"
        )
    return members


def _numbered(part: list[int], members: dict[Hashable, list[int]]) -> list[int]:
    number = {i: n for n, group in enumerate(members.values()) for i in group}
    return [number[i] for i in part]


def _position(group: Hashable, seed: int) -> bytes:
    """Ordered by a hash and not by a shuffled list: adding samples moves few others to another
    part."""
    return hashlib.sha256(f"{seed} {group}".encode()).digest()
