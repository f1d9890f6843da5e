"""Code of others, imported from a clone of its repository."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def imported(clone: Path, module: str, repository: str) -> ModuleType:
    """``module`` of the clone. Ends the program where it is no clone of ``repository``."""
    file = Path(*module.split(".")).with_suffix(".py")
    if not (clone / file).is_file():
        raise SystemExit(f"{clone} is no clone of https://{repository}: {file} is missing there")
    sys.path.insert(0, str(clone))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"https://{repository} needs the package {error.name}") from None
    finally:
        sys.path.remove(str(clone))
