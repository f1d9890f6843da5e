"""What this installation is: versions, what was built, the machine, and who serves what."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from . import native, ops  # noqa: F401  (ops registers the operators)
from .errors import BackendError
from .ops import dispatch
from .version import __version__


def info() -> dict:
    """A plain dict, ready for JSON.

    ``diffad_fast``, ``python``, ``torch``, ``triton``, ``cuda``: versions, None where absent
    (``cuda`` is the one that torch was built with). ``build``: sources (a digest), compiler, flags,
    torch, cuda, cuda_archs and nvcc of the native libraries, None without them. ``cpu``:
    instruction sets, the one of them that the C++ operators use (``kernels``, chosen by
    DIFFAD_FAST_CPU), cores that this process may use, torch's threads and vector capability.
    ``devices``: names of the CUDA devices. ``backend``: the one asked for. ``operators``: for each
    operator the backend that serves it on each device type, None where the one asked for cannot.
    ``unavailable``: backends that did not load, with the reason.
    """
    return {
        "diffad_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "build": native.build_info() or None,
        "cpu": {
            "features": native.cpu_features(),
            "kernels": native.cpu_isa(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backend": dispatch.selected(),
        "operators": {
            name: {device: _serving(operator, device) for device in dispatch.PREFERENCE}
            for name, operator in sorted(dispatch.OPERATORS.items())
        },
        "unavailable": dispatch.unavailable(),
    }


def _serving(operator: dispatch.Operator, device: str) -> str | None:
    try:
        return operator.backend(device)
    except BackendError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
