"""Fast anomaly detection with diffusion models, on images, audio and tables.

``Detector`` fits on normal data and scores new data; ``load`` reads a saved one; ``ops`` are the
operators underneath; ``metrics`` measure a detector; ``info`` tells what was built and which
backend serves each operator; ``use_backend`` chooses one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from . import metrics, ops, reference
    from .config import DetectorConfig
    from .detector import Detector
    from .installation import info
    from .ops.dispatch import use_backend
    from .persistence import load
    from .scoring import Score

__all__ = [
    "Detector",
    "DetectorConfig",
    "Score",
    "__version__",
    "info",
    "load",
    "metrics",
    "ops",
    "reference",
    "use_backend",
]

# Where each name comes from: modules are imported when first asked for, so that a program that
# uses the operators alone does not wait for image libraries.
_ORIGIN = {
    "Detector": "detector",
    "DetectorConfig": "config",
    "Score": "scoring",
    "load": "persistence",
    "info": "installation",
    "use_backend": "ops.dispatch",
}


def __getattr__(name: str):
    if name in ("metrics", "ops", "reference"):
        return importlib.import_module(f".{name}", __name__)
    if name in _ORIGIN:
        importlib.import_module(".ops", __name__)  # operators are registered before any is used
        value = getattr(importlib.import_module(f".{_ORIGIN[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
