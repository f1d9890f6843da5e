"""Types of arguments: what cannot be used is refused with status 2 before anything is measured."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from pathlib import Path


def folder(text: str) -> Path:
    """One that is there."""
    path = Path(text)
    if not path.is_dir():
        raise ArgumentTypeError(f"{text} is not a folder")
    return path


def regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def result(text: str) -> dict:
    """What a suite has written to a file."""
    from . import results

    try:
        found = results.read(text)
    except (OSError, ValueError) as error:  # not there, or no JSON
        raise ArgumentTypeError(f"{text} cannot be read: {error}") from None
    if not isinstance(found, dict) or "rows" not in found:
        raise ArgumentTypeError(f"{text} is no result of a suite")
    return found
