"""Argument checks that the operators share: shapes, dtypes and devices, never the data itself.

Looking at data would make the host wait for the device.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, x, ndim: int | None = None) -> None:
    """``x`` is a floating-point tensor, of ``ndim`` dimensions if given."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}: "
            f"convert it with .float()"
        )
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(x.shape)}")


def shaped(name: str, x, shape: tuple[int, ...], device: torch.device) -> None:
    """``x`` is a floating-point tensor of ``shape`` on ``device``."""
    tensor(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    on_device(name, x, device)


def differentiated_once(name: str) -> None:
    """For backward passes without a derivative of their own: raise RuntimeError in one that is to
    be differentiated again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has no second derivative: leave out create_graph=True, or compute under "
            "use_backend('reference')"
        )


def on_device(name: str, x: torch.Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the first argument on {device}: move one")


def same_dtype(name: str, x: torch.Tensor, other: str, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype} and {other} {dtype}: convert one")


def integer(name: str, value, smallest: int, largest: int) -> int:
    """``value``, an integer (Python's or NumPy's) in [smallest, largest], as Python's."""
    # Python's own type first: isinstance of an abstract class takes ten times as long.
    if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not smallest <= value <= largest:
        raise ValueError(f"{name} must be in [{smallest}, {largest}], got {value}")
    return int(value)


def number(name: str, value, smallest: float, largest: float = float("inf")) -> float:
    """``value``, a real number (Python's or NumPy's) in [smallest, largest], as Python's."""
    if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not smallest <= value <= largest:
        raise ValueError(f"{name} must be in [{smallest}, {largest}], got {value}")
    return float(value)
