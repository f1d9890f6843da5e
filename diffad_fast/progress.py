"""The progress bar: on standard error, after two seconds, and only when somebody can see it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable


def progress(
    iterable: Iterable | None, total: int | None, description: str, unit: str, initial: int = 0
):
    """A `tqdm` bar over `iterable`, or moved by hand with `update` when that is None.

    It counts from `initial` to `total` (None: unknown), and appears after two seconds. It is silent
    where standard error is no terminal or the environment variable DIFFAD_FAST_PROGRESS is 0;
    `update`, `set_postfix` and `close` work all the same. Give `set_postfix` refresh=False, or it
    draws the bar at once.
    """
    from tqdm import tqdm

    seen = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        delay=2.0,
        disable=not seen or os.environ.get("DIFFAD_FAST_PROGRESS") == "0",
        dynamic_ncols=True,
    )
