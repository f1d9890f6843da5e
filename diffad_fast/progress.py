"""The progress bar: on standard error, after two seconds, and only when somebody can see it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable


class _Unseen:
    """What a bar does that nobody sees. tqdm's own takes a lock all the same that processes share,
    and that a fork may copy taken, or a killed worker keep."""

    def __init__(self, iterable: Iterable | None):
        self.iterable = iterable

    def __iter__(self):
        return iter(self.iterable)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def update(self, n: float = 1):
        pass

    def set_postfix(self, **options):
        pass

    def close(self):
        pass


def progress(
    iterable: Iterable | None, total: int | None, description: str, unit: str, initial: int = 0
):
    """A `tqdm` bar over `iterable`, or moved by hand with `update` when that is None.

    It counts from `initial` to `total` (None: unknown), and appears after two seconds. It is silent
    where standard error is no terminal or the environment variable DIFFAD_FAST_PROGRESS is 0;
    `update`, `set_postfix` and `close` work all the same. Give `set_postfix` refresh=False, or it
    draws the bar at once.
    """
    if not _is_terminal(sys.stderr) or os.environ.get("DIFFAD_FAST_PROGRESS") == "0":
        return _Unseen(iterable)
    from tqdm import tqdm

    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        delay=2.0,
        dynamic_ncols=True,
    )


def _is_terminal(stream) -> bool:
    """Is it one? A program may have put something else in its place, or closed it."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False
