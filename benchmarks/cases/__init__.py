"""Every case, one file a family: this is where a new operator adds its own.

A family is a function ``cases(device_type, quick)`` that yields :class:`~benchmarks.case.Case`.
``quick`` asks for the one or two cases that matter most.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from ..case import Case

OPERATORS = (
    "haar", "wavelet", "attention", "norm", "conv", "noise", "diffusion", "token_mlp", "energies",
    "spectrogram", "neighbours", "maps", "detector",
)  # fmt: skip


def load(families: tuple[str, ...], device_type: str, quick: bool) -> Iterator[Case]:
    """The cases of these families."""
    for family in families:
        yield from importlib.import_module(f"{__name__}.{family}").cases(device_type, quick)
