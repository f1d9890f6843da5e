from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

from diffad_fast.ops import dispatch
from tests import interpreter


@pytest.fixture(autouse=True, scope="session")
def _registered():
    """The operators of all kernels are there, whichever test comes first."""
    if "triton" not in dispatch.unavailable():
        kernels = importlib.import_module("diffad_fast.kernels")
        for module in pkgutil.iter_modules(kernels.__path__, "diffad_fast.kernels."):
            importlib.import_module(module.name)


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    """Triton's interpreter replaces the functions of triton.language at the start of a kernel, and
    again for each of our functions that it calls, which takes most of the time: once is enough."""
    if not dispatch.INTERPRETER or "triton" in dispatch.unavailable():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("diffad_fast."):
            return self.rewrite()(*args, **kwargs)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True, scope="module")
def _watched_interpreter():
    """What a kernel reads or writes where it must not fails the test."""
    if not dispatch.INTERPRETER or "triton" in dispatch.unavailable():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        interpreter.install(patch)
        yield


@pytest.fixture(autouse=True)
def _new_memory_is_no_number():
    """What a kernel leaves out, or reads before anything is there, is NaN."""
    if not dispatch.INTERPRETER:
        yield
        return
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_deterministic_debug_mode(before)
