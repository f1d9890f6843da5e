"""Which samples show the same object: those of one group never stand on both sides of a split."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import InputError


def group_labels(groups, count: int) -> list[Hashable]:
    """``groups`` as a list of what can be compared; raises InputError."""
    if not hasattr(groups, "tolist") and not isinstance(groups, Iterable):
        raise InputError(f"groups is {groups!r}: give a label for each of the {count} samples")
    # Elements of tensors compare by identity, those of a pandas Series are found by its index.
    labels = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    labels = [g.item() if getattr(g, "ndim", None) == 0 else g for g in labels]
    if len(labels) != count:
        raise InputError(f"groups has {len(labels)} labels for {count} samples")
    for label in labels:
        with suppress(TypeError):
            hash(label)  # of a tuple with a list in it, too
            if not getattr(label, "ndim", 0):
                if label != label:
                    raise InputError(
                        f"groups has the label {label!r}, which equals no label, not even itself: "
                        "give those samples another one, the same where they belong together"
                    )
                continue
        raise InputError(f"groups has the label {label!r}: give a number or a text a sample")
    return labels


def groups_by_regex(paths: Sequence[str], pattern: str) -> list[str]:
    """The group of each file: what the first parenthesis of ``pattern`` matches in its name.

    Without a parenthesis, the whole match. Raises InputError where a file does not match, or that
    parenthesis matches nothing in it.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"group regex {pattern!r} is not a regular expression: {error}") from None
    groups = []
    for path in paths:
        match = compiled.search(Path(path).name)
        group = None if match is None else match[1 if compiled.groups else 0]
        if group is None:
            raise InputError(f"group regex {pattern!r} does not match {Path(path).name}")
        groups.append(group)
    return groups
