"""The held-out parts of the normals, split by group."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from ..config import DetectorConfig
from ..errors import InputError

SMALLEST_SET = 8


class Split(NamedTuple):
    """Indices of the four parts; disjoint, and no group stands in two of them."""

    fit: list[int]
    validation: list[int]
    statistics: list[int]
    conformal: list[int]
    conformal_groups: int
    """How many groups the conformal part holds."""


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
    label = (lambda i: i) if groups is None else (lambda i: groups[i])
    members: dict[Hashable, list[int]] = {}
    for i in indices:
        members.setdefault(label(i), []).append(i)
    if len(indices) < SMALLEST_SET:
        raise InputError(
            f"{len(indices)} usable normal sample{'' if len(indices) == 1 else 's'}: fit needs "
            f"at least {SMALLEST_SET}, because parts are held out for calibration"
        )
    if len(members) < 4:
        raise InputError(
            f"the groups put all normals into {len(members)} object(s): fit needs at least 4, "
            "because whole groups are held out for calibration"
        )

    # Ordered by a hash and not by a shuffled list: adding samples moves few others to another part.
    def position(group: Hashable) -> bytes:
        return hashlib.sha256(f"{config.seed} {group}".encode()).digest()

    shares = (config.validation_share, config.statistics_share, config.conformal_share)
    largest = max(1, max(shares) * len(indices))
    order = sorted(members, key=lambda g: (len(members[g]) > largest, position(g)))
    n = len(order)
    sizes = [max(1, round(n * share)) for share in shares]
    while sum(sizes) > n - 1:
        sizes[sizes.index(max(sizes))] -= 1
    parts, start = [], 0
    for size in sizes:
        parts.append(sorted(i for group in order[start : start + size] for i in members[group]))
        start += size
    fit = sorted(i for group in order[start:] for i in members[group])
    return Split(fit, *parts, sizes[-1])
