"""Code of others, imported from a clone of its repository."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from diffad_fast.errors import InputError


def imported(clone: Path, module: str, repository: str) -> ModuleType:
    """``module`` of the clone. Raises InputError where it is no clone of ``repository``, and for a
    package that is missing."""
    file = Path(*module.split(".")).with_suffix(".py")
    if not (clone / file).is_file():
        raise InputError(f"{clone} is no clone of https://{repository}: {file} is missing there")
    sys.path.insert(0, str(clone))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"https://{repository} needs the package {error.name}") from None
    finally:
        sys.path.remove(str(clone))
