"""Which backend serves an operator.

Every operator has a ``reference`` implementation in plain PyTorch and may have faster ones:
``cpu`` (C++), ``triton`` and ``cuda``. Under ``auto`` the first implementation of the tensor's
device type in :data:`PREFERENCE` that the operator has and that loaded on this machine serves the
call. A backend that was asked for by name and is missing raises; a few of its operators leave some
calls, such as gradients of maps, to the reference, as their docstrings say.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from ..errors import BackendError, InputError
from ..reference.modes import in_transform

BACKENDS = ("reference", "cpu", "triton", "cuda")
# The order in which `auto` tries the backends for a tensor on a device of this type.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# Triton's interpreter runs the kernels on any device, slowly: for tests.
INTERPRETER = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

OPERATORS: dict[str, Operator] = {}
_unavailable: dict[str, str] = {}  # backend -> why it did not load on this machine


class _Choice:
    """A backend, of one block ``with use_backend(...)``."""

    def __init__(self, backend: str):
        self.backend = backend


# That of the environment, and those of all blocks that have not ended, in the order in which they
# began: blocks of threads may end in another.
_choices = [_Choice("auto")]


class _OfThread(threading.local):
    backend: str | None = None


_of_thread = _OfThread()


class Operator:
    """One operator and its implementations.

    ``reference`` is required. Each further keyword names a backend; an implementation of ``None``
    means that the backend does not have this operator, and so does that of a backend that is
    unavailable here. Called like a function, the device of the first argument, a tensor, decides;
    :meth:`on` takes the device by itself.

    ``refuses`` has, for a backend, a function of the call's arguments that says why it cannot serve
    them, or None: `auto` then takes the next one.
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        refuses: Mapping[str, Callable] | None = None,
        **implementations: Callable | None,
    ):
        self.name, self.refuses = name, dict(refuses or {})
        unknown = {*implementations, *self.refuses} - set(BACKENDS)
        if unknown:
            raise ValueError(f"operator {name!r} names unknown backends {sorted(unknown)}")
        self.implementations = {"reference": reference}
        self.implementations.update(
            {k: f for k, f in implementations.items() if f is not None and k not in _unavailable}
        )
        OPERATORS[name] = self

    def backend(self, device_type: str, *args) -> str:
        """The backend that serves a call on ``device_type`` now. Raises BackendError if none.

        Without the call's arguments no implementation refuses it.
        """
        order, asked = PREFERENCE.get(device_type, ("reference",)), selected()
        if in_transform():
            if asked not in ("auto", "reference"):
                raise BackendError(
                    f"backend {asked!r} knows neither torch.func nor forward-mode automatic "
                    "differentiation: use_backend('auto') takes the reference there"
                )
            return "reference"
        if asked == "auto":
            for backend in order:
                if backend in self.implementations and self._refusal(backend, args) is None:
                    return backend
        if asked not in self.implementations:
            raise BackendError(
                f"backend {asked!r} was asked for, but operator {self.name!r} has only "
                f"{', '.join(self.implementations)}: use_backend('auto') picks the best of these"
            )
        by_name = ("reference", "triton") if INTERPRETER else ("reference",)
        if asked not in order and asked not in by_name:
            raise BackendError(
                f"backend {asked!r} cannot serve {self.name!r} on a {device_type} tensor: "
                f"move the tensor or choose one of {', '.join(order)}"
            )
        why = self._refusal(asked, args)
        if why is not None:
            raise BackendError(
                f"backend {asked!r} cannot serve this call of {self.name!r}: {why}; "
                f"use_backend('auto') picks one that can"
            )
        return asked

    def __call__(self, x, *args):
        return self.on(x.device, x, *args)(x, *args)

    def on(self, device: torch.device, *args) -> Callable:
        """The implementation that serves a call on ``device`` now."""
        return self.implementations[self.backend(device.type, *args)]

    def _refusal(self, backend: str, args: tuple) -> str | None:
        refuses = self.refuses.get(backend)
        return refuses(*args) if refuses is not None and args else None


def kernel(module: str, name: str) -> Callable:
    """The function ``name`` of ``diffad_fast.kernels.<module>``, imported by its first call."""

    def function(*args):
        from .. import kernels

        return getattr(getattr(kernels, module), name)(*args)

    return function


def takes_cpp(x: torch.Tensor) -> bool:
    """Do C++ operators serve ``x`` now, as it is: no trace, no transform, no autocast?"""
    return (
        x.device.type == "cpu"
        and selected() in ("auto", "cpu")
        and not torch.compiler.is_compiling()
        and not in_transform()
        and not torch.is_autocast_enabled("cpu")
    )


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if importlib.util.find_spec("diffad_fast.kernels") is None:
        return "diffad_fast.kernels is not installed: pip install -e . or link kernels/ there"
    if torch.version.cuda is None and not INTERPRETER:
        return (
            f"torch {torch.__version__} was built without CUDA (TRITON_INTERPRET=1 runs the kernels"
            f" slowly without)"
        )
    return None


def mark_unavailable(backend: str, why: str) -> None:
    """Record why ``backend`` did not load, for error messages and :func:`diffad_fast.info`."""
    _unavailable[backend] = why


if (_why := _why_no_triton()) is not None:
    mark_unavailable("triton", _why)


def unavailable() -> dict[str, str]:
    """Backends that did not load on this machine, each with the reason."""
    return dict(_unavailable)


def selected() -> str:
    """The backend asked for: ``auto`` or one of :data:`BACKENDS`."""
    if torch.compiler.is_dynamo_compiling():  # which does not follow what belongs to a thread
        return _choices[-1].backend
    return _of_thread.backend or _choices[-1].backend


def _choice(name: str) -> _Choice:
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}: choose auto, {', '.join(BACKENDS)}")
    if name in _unavailable:
        raise BackendError(f"backend {name!r} is not available here: {_unavailable[name]}")
    return _Choice(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator by backend ``name`` inside the ``with`` block (process-wide; of blocks
    in several threads the one that began last decides).

    ``name`` is ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``. Raises
    InputError for another name and BackendError where the backend is missing: at once if it did
    not load on this machine, at the call if an operator does not have it.
    """
    choice = _choice(name)
    _choices.append(choice)
    try:
        yield
    finally:
        _choices.remove(choice)


@contextmanager
def by_reference() -> Iterator[None]:
    """Serve every operator that this thread calls in plain PyTorch, for programs that are to run
    without this library."""
    if torch.compiler.is_dynamo_compiling():  # nobody else computes inside of its trace
        with use_backend("reference"):
            yield
        return
    previous, _of_thread.backend = _of_thread.backend, "reference"
    try:
        yield
    finally:
        _of_thread.backend = previous


def select_from_environment() -> None:
    """Apply ``DIFFAD_FAST_BACKEND``; called once all operators are registered."""
    _choices[0] = _choice(os.environ.get("DIFFAD_FAST_BACKEND") or "auto")
