"""Which backend serves an operator.

Every operator has a ``reference`` implementation in plain PyTorch and may have faster ones:
``cpu`` (C++), ``triton`` and ``cuda``. Under ``auto`` the first implementation of the tensor's
device type in :data:`PREFERENCE` that the operator has and that loaded on this machine serves the
call. A backend that was asked for by name and cannot serve a call raises; it never falls back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..errors import BackendError, InputError

BACKENDS = ("reference", "cpu", "triton", "cuda")
# The order in which `auto` tries the backends for a tensor on a device of this type.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

OPERATORS: dict[str, Operator] = {}
_unavailable: dict[str, str] = {}  # backend -> why it did not load on this machine
_selected = "auto"


class Operator:
    """One operator and its implementations.

    ``reference`` is required. Each further keyword names a backend; an implementation of ``None``
    means that the backend does not have this operator (or did not load). Called like a function,
    the device of the first argument, a tensor, decides; :meth:`on` takes the device by itself.
    """

    def __init__(self, name: str, reference: Callable, **implementations: Callable | None):
        unknown = set(implementations) - set(BACKENDS)
        if unknown:
            raise ValueError(f"operator {name!r} names unknown backends {sorted(unknown)}")
        self.name = name
        self.implementations = {"reference": reference}
        self.implementations.update({k: f for k, f in implementations.items() if f is not None})
        OPERATORS[name] = self

    def backend(self, device_type: str) -> str:
        """The backend that serves a call on ``device_type`` now. Raises BackendError if none."""
        order = PREFERENCE.get(device_type, ("reference",))
        if _selected == "auto":
            return next(b for b in order if b in self.implementations)
        if _selected not in self.implementations:
            raise BackendError(
                f"backend {_selected!r} was asked for, but operator {self.name!r} has only "
                f"{', '.join(self.implementations)}: use_backend('auto') picks the best of these"
            )
        if _selected not in order and _selected != "reference":
            raise BackendError(
                f"backend {_selected!r} cannot serve {self.name!r} on a {device_type} tensor: "
                f"move the tensor or choose one of {', '.join(order)}"
            )
        return _selected

    def __call__(self, x, *args):
        return self.on(x.device)(x, *args)

    def on(self, device: torch.device) -> Callable:
        """The implementation that serves a call on ``device`` now."""
        return self.implementations[self.backend(device.type)]


def mark_unavailable(backend: str, why: str) -> None:
    """Record why ``backend`` did not load, for error messages and :func:`diffad_fast.info`."""
    _unavailable[backend] = why


def unavailable() -> dict[str, str]:
    """Backends that did not load on this machine, each with the reason."""
    return dict(_unavailable)


def selected() -> str:
    """The backend asked for: ``auto`` or one of :data:`BACKENDS`."""
    return _selected


def select(name: str) -> None:
    """Ask for a backend for the whole process; see :func:`use_backend` for a limited time."""
    global _selected
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}: choose auto, {', '.join(BACKENDS)}")
    if name in _unavailable:
        raise BackendError(f"backend {name!r} is not available here: {_unavailable[name]}")
    _selected = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator by backend ``name`` inside the ``with`` block (process-wide).

    ``name`` is ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``. Raises
    InputError for another name and BackendError where the backend is missing: at once if it did
    not load on this machine, at the call if an operator does not have it.
    """
    previous = _selected
    select(name)
    try:
        yield
    finally:
        select(previous)


def select_from_environment() -> None:
    """Apply ``DIFFAD_FAST_BACKEND``; called once all operators are registered."""
    select(os.environ.get("DIFFAD_FAST_BACKEND") or "auto")
