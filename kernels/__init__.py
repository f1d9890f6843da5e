"""Triton kernels, one file a kernel; imported as ``diffad_fast.kernels``.

A kernel's module is an attribute of the package that its first use imports: Triton takes longer to
import than all the rest. torch.compile traces such an attribute, but not ``importlib``.
"""

import importlib


def __getattr__(name: str):
    module = f"{__name__}.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
