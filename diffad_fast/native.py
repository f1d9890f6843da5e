"""Finds and loads the native operators, and tells which of them are there.

The library registers its operators with PyTorch under ``torch.ops.diffad_fast``. Without it
everything still works, on the reference backend, after one warning.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from .errors import BackendError
from .version import digest_of_sources

try:
    from . import _host
except ImportError:
    _host = None

LIBRARY = Path(__file__).with_name("_C.abi3.so")
SOURCES = Path(__file__).parents[1] / "csrc"  # in a checkout; an installed package has none
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# In the order of the C++ enumeration Isa.
CPU_ISAS = ("default", "avx2", "avx512", "avx512_bf16", "amx")
BF16_ISAS = CPU_ISAS[3:]  # with products of bfloat16


def implementations(name: str) -> dict[str, Callable]:
    """The native implementations of operator ``name`` here: ``{"cpu": ..., "cuda": ...}``.

    Each value is ``torch.ops.diffad_fast.<name>.default``. A backend that is unavailable here or
    that the operator was not built for is left out.
    """
    from .ops.dispatch import unavailable

    if not loaded():
        return {}
    try:
        operator = getattr(torch.ops.diffad_fast, name).default
    except AttributeError:
        raise BackendError(
            f"the native library {LIBRARY} has no operator {name!r}: it was built from another "
            "version of the sources, so build it again (pip install -e . or make)"
        ) from None
    return {
        backend: operator
        for backend, key in _DISPATCH_KEYS.items()
        if backend not in unavailable()
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"diffad_fast::{name}", key)
    }


def loaded() -> bool:
    """Is the library of native operators loaded? The first call loads it."""
    # Imported here: the operator files call this while they are being imported themselves.
    from .ops.dispatch import mark_unavailable

    return _load(mark_unavailable)


def build_info() -> dict:
    """What was built: sources (a digest), compiler, flags, torch, cuda, cuda_archs, nvcc; empty
    without the module."""
    return _host.build_info() if _host else {}


def cpu_features() -> list[str]:
    """Instruction sets of this processor that matter here; empty without the module."""
    return _host.cpu_features() if _host else []


def cpu_isa() -> str | None:
    """The instruction set that the C++ operators use, one of CPU_ISAS; None without them."""
    return CPU_ISAS[torch.ops.diffad_fast.cpu_isa(-1)] if loaded() else None


def select_cpu_isa(name: str) -> None:
    """Use the instruction set ``name`` from now on, in the whole process.

    ``DIFFAD_FAST_CPU`` does the same at the start. Raises BackendError for an unknown name and
    for one that this processor does not have.
    """
    if name not in CPU_ISAS:
        raise BackendError(
            f"unknown instruction set {name!r}: set DIFFAD_FAST_CPU to {', '.join(CPU_ISAS)}"
        )
    try:
        torch.ops.diffad_fast.cpu_isa(CPU_ISAS.index(name))
    except RuntimeError:
        raise BackendError(
            f"this processor cannot run instruction set {name!r}, it has "
            f"{', '.join(cpu_features()) or 'none known'}: unset DIFFAD_FAST_CPU for the best one"
        ) from None


@cache
def _load(mark_unavailable: Callable[[str, str], None]) -> bool:
    """Load the library, once, and mark the backends that it cannot serve."""
    why = _try_load()
    if why is not None:
        warnings.warn(
            f"diffad_fast runs on the slower reference backend: {why}", RuntimeWarning, stacklevel=3
        )
        mark_unavailable("cpu", why)
        mark_unavailable("cuda", why)
    elif torch.version.cuda is None:
        mark_unavailable("cuda", f"torch {torch.__version__} was built without CUDA")
    elif not build_info().get("cuda", True):
        mark_unavailable("cuda", "the native library was built without CUDA, no nvcc was there")
    if why is None and (SOURCES / "ops.cpp").exists() and _stale():
        warnings.warn(
            f"the native library {LIBRARY} was built from other sources than {SOURCES} holds, or "
            "for another Python: build it again (pip install -e . or make)",
            RuntimeWarning,
            stacklevel=3,
        )
    if why is None and (isa := os.environ.get("DIFFAD_FAST_CPU")):
        select_cpu_isa(isa)
    return why is None


def _stale() -> bool:
    return build_info().get("sources") != digest_of_sources(SOURCES)


def _try_load() -> str | None:
    if not LIBRARY.exists():
        return f"its native library {LIBRARY} is missing, reinstall with a C++ compiler at hand"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"its native library {LIBRARY} does not load: {error}"
    return None
