"""Finds and loads the native operators, and tells which of them are there.

The library registers its operators with PyTorch under ``torch.ops.diffad_fast``. Without it
everything still works, on the reference backend, after one warning.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache

import torch

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def implementations(name: str) -> dict[str, Callable]:
    """The native implementations of operator ``name`` here: ``{"cpu": ..., "cuda": ...}``.

    Each value is ``torch.ops.diffad_fast.<name>``; a backend that the library was built without is
    left out, and without the library the result is empty.
    """
    if not loaded():
        return {}
    operator = getattr(torch.ops.diffad_fast, name)
    return {
        backend: operator
        for backend, key in _DISPATCH_KEYS.items()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"diffad_fast::{name}", key)
        and missing(backend) is None
    }


def loaded() -> bool:
    """Is the library of native operators loaded? The first call loads it."""
    return _load() is None


def missing(backend: str) -> str | None:
    """Why ``backend`` (``"cpu"`` or ``"cuda"``) cannot serve here; None where it can."""
    why = _load()
    if why is None and backend == "cuda":
        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA"
        if not build_info().get("cuda", True):
            return "the native library was built without CUDA (no nvcc at build time)"
    return why


@cache
def build_info() -> dict:
    """What was built: compiler, flags, torch, cuda, cuda_archs, nvcc; empty without the module."""
    try:
        from . import _host
    except ImportError:
        return {}
    return _host.build_info()


@cache
def _load() -> str | None:
    """Load the library; None, or why that failed (after one warning)."""
    why = _try_load()
    if why is not None:
        warnings.warn(
            f"diffad_fast runs on the slower reference backend: {why}",
            RuntimeWarning,
            stacklevel=2,
        )
    return why


def _try_load() -> str | None:
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is None or spec.origin is None:
        return "its native library is missing, reinstall with a C++ compiler at hand"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"its native library {spec.origin} does not load: {error}"
    return None
