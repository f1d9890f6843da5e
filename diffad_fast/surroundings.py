"""Where a detector computes: the device, and what of the surrounding program must not reach it."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import BackendError, InputError


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is; of several GPUs, if no number says which, the one
    that is the program's now: it stays that one in other threads. Raises BackendError if it is not
    there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = device
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {str(name)!r}: choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device {device} was asked for, but PyTorch finds {torch.cuda.device_count()} CUDA "
            "GPU(s): use cpu"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


class drawing_from(TorchDispatchMode):
    """What this thread draws comes from a generator of its own, on the CPU: that of the process,
    which other threads draw from, stays as it is. Raises RuntimeError for a function of PyTorch
    that takes no generator."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            if all(a.name != "generator" for a in func._schema.arguments):
                if "generator" not in func.overloadpacket.overloads():
                    raise RuntimeError(f"{func} takes no generator: draw by another function")
                func = func.overloadpacket.generator
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


class _Evaluation:
    """One ``with evaluating(...)``: its thread, all parts of its modules, and those that its end
    puts back into training mode."""

    def __init__(self, parts: set[nn.Module]):
        self.thread, self.parts = threading.get_ident(), parts
        self.training: list[nn.Module] = []

    def begin(self) -> None:
        with _turn:
            _evaluations.append(self)
            self.training = [part for part in self.parts if part.training]
            for part in self.training:
                part.training = False

    def end(self) -> None:
        with _turn:
            if self not in _evaluations:  # an interrupt came first
                return
            place = _evaluations.index(self)
            del _evaluations[place]
            for part in self.training:
                for later in _evaluations[place:]:
                    if part in later.parts:
                        later.training.append(part)
                        break
                else:
                    part.training = True


# A signal's handler may call a detector, too.
_turn = threading.RLock()
_evaluations: list[_Evaluation] = []
"""Those of all threads that have not ended, in the order of their beginnings."""


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """All of them in evaluation mode, and each part in its own again afterwards: somebody else may
    be at work on modules that were handed over. Threads may overlap: what one of them would put
    back while another, later one is still inside is put back by that one, also if the mode was set
    anew in between: nobody else may set it as long as any thread is inside."""
    parts: set[nn.Module] = set()
    to_see = list(modules)
    while to_see:  # what modules() gives, in a quarter of its time
        part = to_see.pop()
        if part is not None and part not in parts:
            parts.add(part)
            to_see += part._modules.values()
    mine = _Evaluation(parts)
    try:
        mine.begin()
        yield
    finally:
        mine.end()


class _Settings:
    """Settings of the whole process, at PyTorch's own defaults while any thread is inside: the
    default dtype, and products of float32 in float32 (``high`` and ``medium`` would take TF32 or
    bfloat16 for them). Those of convolutions are the caller's."""

    def __init__(self):
        self._inside = 0
        self._put_back: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        with _turn:
            self._inside += 1
            try:
                if self._inside == 1:
                    self._set()
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *_) -> None:
        with _turn:
            self._inside -= 1
            while self._inside == 0 and self._put_back:
                self._put_back.pop()()

    def _set(self) -> None:
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            self._put_back.append(functools.partial(torch.set_default_dtype, dtype))
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:  # not of all libraries at once, but of one: it does not know which
            precision = None
        if precision != "highest":
            self._set_precision(precision)

    def _set_precision(self, precision: str | None) -> None:
        def put_back(*call) -> None:
            self._put_back.append(functools.partial(*call))

        general = torch.backends.fp32_precision  # what the others inherit; first, to see their own
        torch.backends.fp32_precision = "none"
        put_back(setattr, torch.backends, "fp32_precision", general)
        libraries = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        for library in libraries:
            put_back(setattr, library, "fp32_precision", library.fp32_precision)
        if general == "ieee":
            torch.backends.fp32_precision = general
        if precision is None:
            for library in libraries:
                library.fp32_precision = "ieee"
        else:  # writes into both
            torch.set_float32_matmul_precision("highest")
            put_back(torch.set_float32_matmul_precision, precision)


_settings = _Settings()
_forked = False
"""Whether this process is a fork that has computed nothing yet."""


def _note_fork() -> None:
    global _forked, _settings, _turn
    _forked, _settings, _turn = True, _Settings(), threading.RLock()
    for other in [e for e in _evaluations if e.thread != threading.get_ident()]:
        other.end()  # its thread is not in this process


os.register_at_fork(after_in_child=_note_fork)


def _on_one_thread() -> None:
    """A fork has none of OpenMP's threads, and what computes on several waits for them for ever."""
    global _forked
    _forked = False
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "this process is a fork, where PyTorch's threads may hang: it computes on one thread "
            "from now on; start processes by 'spawn' or 'forkserver' for more, or call "
            "torch.set_num_threads(1) first",
            RuntimeWarning,
            stacklevel=3,
        )


def undisturbed(call: Callable) -> Callable:
    """``call`` without what surrounds it and would change its numbers or keep it from training:
    autocast, no_grad and inference mode, modules in training mode, a default device, and the
    settings of the whole process that :class:`_Settings` names. In a fork it computes on one
    thread."""

    @functools.wraps(call)
    def alone(*args, **options):
        if _forked:
            _on_one_thread()
        elsewhere = not torch.empty(0).is_cpu  # by a default device
        with ExitStack() as stack:
            stack.enter_context(_settings)
            if elsewhere:
                stack.enter_context(torch.device("cpu"))
            for kind in ("cpu", "cuda"):
                # Not where it is off: inside of another one a block of autocast keeps what it cast.
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(torch.inference_mode(False))  # enables gradients, too
            stack.enter_context(evaluating(getattr(args[0] if args else None, "model", None)))
            return call(*args, **options)

    return alone
