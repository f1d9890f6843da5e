"""The host of an integration, or a sentence that says how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str) -> ModuleType:
    """The module ``name``. Raises ImportError that names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        host = name.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == host:
            why = f"{host} is not installed"
        else:
            why = f"{host} is installed but cannot be imported ({error})"
        raise ImportError(
            f"this integration needs {host}: {why}; pip install 'diffad_fast[plugins]'",
            name=host,
        ) from error
