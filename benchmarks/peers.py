"""The packages that a user would pick instead: which are here, and why the others are not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# Module to import -> its distribution.
PEERS = {
    "pywt": "PyWavelets",
    "ptwt": "ptwt",
    "pytorch_wavelets": "pytorch_wavelets",
    "diffusers": "diffusers",
    "pyod": "pyod",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "librosa": "librosa",
    "anomalib": "anomalib",
}


@cache
def get(module: str):
    """The imported module, or None; :func:`absent` then has the reason."""
    try:
        if module == "pytorch_wavelets" and importlib.util.find_spec("pkg_resources") is None:
            with _resource_stream():
                return importlib.import_module(module)
        if module == "anomalib":
            _declare_operators_of_torchvision()
        return importlib.import_module(module)
    except Exception as error:  # whatever stops a foreign package from loading
        _reasons[module.split(".")[0]] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def absent() -> dict[str, str]:
    """Package -> why it takes no part."""
    for module in PEERS:
        get(module)
    return {PEERS[module]: _reasons[module] for module in PEERS if module in _reasons}


def versions() -> dict[str, str]:
    """Package -> version, of those that are here."""
    return {
        package: importlib.metadata.version(package)
        for module, package in PEERS.items()
        if get(module) is not None
    }


_reasons: dict[str, str] = {}
_library: list[torch.library.Library] = []


def _declare_operators_of_torchvision() -> None:
    """What PyPI's torchvision, linked to CUDA, refers to and does not register beside a CPU build
    of torch (pytorch/vision#9085)."""
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        _library.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _library[0].define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")


@contextmanager
def _resource_stream() -> Iterator[None]:
    """What pytorch_wavelets 1.3 imports from pkg_resources, which setuptools 82 removed."""
    module = types.ModuleType("pkg_resources")
    module.resource_stream = lambda package, name: (
        importlib.resources.files(package).joinpath(name).open("rb")
    )
    sys.modules["pkg_resources"] = module
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]
