"""Watches what kernels read and write in Triton's interpreter, which takes any address and runs one
program after the other.

Found are, of lanes that no mask excludes: what lies outside the tensor that the address was made
of, by its sizes and strides; addresses that are no multiple of the element's size; what one program
of a launch writes and another one reads or writes, even if the value is the same, since on a GPU
they run at once; and lanes of one store that write different values to one place.

Not found are missing barriers inside a program, which the compiler places, and races with atomics,
which no kernel uses: of these only the addresses are checked.
"""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# A pointer carries the number of its tensor above the bits that processes have for addresses: so
# it is known for which tensor it was meant, wherever it points.
NUMBER = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)
NOBODY, SEVERAL = 0, -1  # in place of a program, of which the first is 1


class MemoryFault(AssertionError):
    pass


class Storage:
    """Who wrote and who read each cell of memory, a cell being the smallest element kept in it."""

    def __init__(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.cell = tensor.element_size()
        self._programs: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def programs(self) -> tuple[np.ndarray, np.ndarray]:
        """Writers and readers."""
        if self._programs is None:  # after all tensors of the launch are known
            cells = self.size // self.cell
            self._programs = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        return self._programs


class Argument:
    """A tensor of a launch."""

    def __init__(self, name: str, tensor: torch.Tensor, number: int, storage: Storage):
        self.name, self.storage = name, storage
        self.itemsize, self.tag = tensor.element_size(), number << 48
        self.start = tensor.data_ptr()
        axes = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1 and s]
        sizes, strides = zip(*axes, strict=True) if axes else ((), ())
        span = 1 + sum((n - 1) * s for n, s in axes) if tensor.numel() else 0
        self.size = span * self.itemsize
        self.exists = None  # which elements of the span the view has, if not all
        if span > math.prod(sizes):
            exists = torch.zeros(span, dtype=torch.bool)
            exists.as_strided(sizes, strides).fill_(True)
            self.exists = exists.numpy()


class Launch:
    """A launch of ``kernel``, and its memory."""

    def __init__(self, kernel: str, names: dict[int, str]):
        self.kernel, self.names = kernel, names
        self.arguments: list[Argument] = []
        self.storages: dict[int, Storage] = {}

    def tagged(self, tensor: torch.Tensor, name: str) -> int:
        """What to add to the tensor's address."""
        start = tensor.untyped_storage().data_ptr()
        storage = self.storages.setdefault(start, Storage(tensor))
        storage.cell = min(storage.cell, tensor.element_size())
        self.arguments.append(Argument(name, tensor, len(self.arguments) + 1, storage))
        return self.arguments[-1].tag


class Watch:
    """Stands in for the module of the interpreter that reads and writes memory."""

    def __init__(self, memory, builder):
        self.memory, self.builder = memory, builder
        self.launch: Launch | None = None

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def load(self, pointers, mask, *others):
        *_, dtype = others
        self._check("loads", pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers & ADDRESS, mask, *others)

    def store(self, pointers, value, mask):
        self._check("stores", pointers, mask, value.itemsize)
        addresses = pointers & ADDRESS
        self.memory.store(addresses, value, mask)
        there = self.memory.load(addresses, mask, value, value.dtype)
        bits = f"u{value.itemsize}"
        different = np.ascontiguousarray(there).view(bits) != np.ascontiguousarray(value).view(bits)
        if different.any():
            self._fault("stores different values to", pointers[different], None)

    def atomic_rmw(self, operation, pointers, value, mask, *others):
        self._check("updates", pointers, mask, value.itemsize)
        return self.memory.atomic_rmw(operation, pointers & ADDRESS, value, mask, *others)

    def atomic_cas(self, pointers, compared, value, *others):
        self._check("updates", pointers, np.ones(pointers.shape, bool), value.itemsize)
        return self.memory.atomic_cas(pointers & ADDRESS, compared, value, *others)

    def _check(self, verb: str, pointers: np.ndarray, mask, itemsize: int) -> None:
        """Raise MemoryFault unless a program may do this to all elements at ``pointers``."""
        pointers = pointers[np.asarray(mask, bool)]
        if not pointers.size:
            return
        low, high = int(pointers.min()), int(pointers.max())
        if low >> 48 != high >> 48:
            numbers = pointers >> NUMBER
            for number in np.unique(numbers):
                part = pointers[numbers == number]
                self._check(verb, part, np.ones(len(part), bool), itemsize)
            return
        argument = self._argument(low)
        if argument is None:
            self._fault(verb, pointers, "which is of no argument")
        first = argument.tag + argument.start
        if low < first:
            self._fault(verb, pointers[pointers < first], "before its start")
        if high + itemsize > first + argument.size:
            last = first + argument.size - itemsize
            beyond = pointers > last if last >= first else pointers >= first
            self._fault(verb, pointers[beyond], f"beyond its end at {argument.size}")
        if int(np.bitwise_or.reduce(pointers)) & (itemsize - 1):
            wrong = (pointers & np.uint64(itemsize - 1)) != 0
            self._fault(verb, pointers[wrong], f"which is no multiple of {itemsize}")
        if argument.exists is not None:
            exists = argument.exists[(pointers - np.uint64(first)) // np.uint64(argument.itemsize)]
            if not exists.all():
                self._fault(verb, pointers[~exists], "between the elements of the view")
        if verb != "updates":
            self._check_races(verb, pointers, argument, itemsize)

    def _check_races(self, verb, pointers, argument, itemsize) -> None:
        storage = argument.storage
        cells = pointers - np.uint64(argument.tag + storage.start)
        cells = (cells // np.uint64(storage.cell)).view(np.int64)
        if itemsize > storage.cell:
            cells = cells[:, None] + np.arange(itemsize // storage.cell)
        program = self._program()
        writers, readers = storage.programs
        written_by = writers[cells]
        self._alone(verb, "written", pointers, written_by, program)
        read_by = readers[cells]
        if verb == "stores":
            self._alone(verb, "read", pointers, read_by, program)
            writers[cells] = program
        else:
            alone = (read_by == program) | (read_by == NOBODY)
            readers[cells] = np.where(alone, program, SEVERAL)

    def _alone(self, verb, done, pointers, by, program) -> None:
        """No other program is among ``by``, those that have ``done`` something."""
        others = (by != program) & (by != NOBODY)
        if others.any():
            others = others.reshape(len(pointers), -1)
            other = by.reshape(others.shape)[others][0]
            who = "others have" if other == SEVERAL else f"program {self._indices(other)} has"
            self._fault(verb, pointers[others.any(1)], f"which {who} {done}")

    def _program(self) -> int:
        (x, y, z), (_, ny, nz) = self.builder.grid_idx, self.builder.grid_dim
        return 1 + (x * ny + y) * nz + z

    def _indices(self, program: int) -> tuple[int, ...]:
        found = np.unravel_index(program - 1, self.builder.grid_dim)
        return tuple(int(i) for i in found)

    def _argument(self, pointer: int) -> Argument | None:
        number, arguments = pointer >> 48, self.launch.arguments
        return arguments[number - 1] if 0 < number <= len(arguments) else None

    def _fault(self, what: str, pointers: np.ndarray, why: str | None):
        """Raise MemoryFault for the first of these pointers."""
        pointer = int(pointers[0])
        argument = self._argument(pointer)
        place = f"address {pointer:#x}"
        if argument is not None:
            place = f"byte {pointer - argument.tag - argument.start} of {argument.name!r}"
        program = self._indices(self._program())
        lanes = f" ({len(pointers)} lanes)" if len(pointers) > 1 else ""
        raise MemoryFault(
            f"{self.launch.kernel}, program {program}, {_line()}: {what} {place}"
            f"{', ' + why if why else ''}{lanes}"
        )


def _line() -> str:
    """The line of a kernel, or of a function that it calls, where it is now."""
    import triton

    ours = __file__, str(Path(triton.__file__).parent)
    frame = sys._getframe()
    while frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch every launch from now on: what a kernel does wrong is raised as MemoryFault."""
    from triton.runtime import interpreter

    watch = Watch(interpreter._interpreter, interpreter.interpreter_builder)
    executor = interpreter.GridExecutor
    call, to_host, converted = executor.__call__, executor._init_args_hst, interpreter._implicit_cvt

    def watched(self, *args, **kwargs):
        try:
            return call(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause = error
            while cause is not None:  # an error inside a function has been wrapped again
                if isinstance(cause, MemoryFault):
                    raise cause from None
                cause = cause.__cause__
            raise
        finally:
            watch.launch = None

    def begun(self, args, kwargs):
        args, kwargs = to_host(self, args, kwargs)  # copies, if the tensors are on another device
        by_name = inspect.getcallargs(self.fn, *args, **kwargs)
        watch.launch = Launch(self.fn.__name__, {id(x): name for name, x in by_name.items()})
        return args, kwargs

    def tagged(arg):
        result = converted(arg)
        if hasattr(arg, "data_ptr"):
            tensor, name = interpreter._unwrap_tensor(arg), watch.launch.names.get(id(arg), "?")
            tag = np.uint64(watch.launch.tagged(tensor, name))
            result.handle.data = result.handle.data + tag
        return result

    monkeypatch.setattr(interpreter, "_interpreter", watch)
    monkeypatch.setattr(executor, "__call__", watched)
    monkeypatch.setattr(executor, "_init_args_hst", begun)
    monkeypatch.setattr(interpreter, "_implicit_cvt", tagged)
