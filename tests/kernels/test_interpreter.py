"""What tests/interpreter.py has to see, on kernels that do it, and what it has to let pass."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch

from diffad_fast.ops import dispatch
from tests.interpreter import MemoryFault

pytest.importorskip("triton")
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETER, reason="a GPU runs the kernels")


@triton.jit
def _copy(x, y, size, shift, BLOCK: tl.constexpr):
    """y[i] = x[i + shift]; lanes beyond the size point far away."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    far = tl.where(i < size, i.to(tl.int64), 1 << 40)
    tl.store(y + far, _shifted(x, far, shift, i < size), i < size)


@triton.jit
def _shifted(x, i, shift, mask):
    return tl.load(x + i + shift, mask)


@triton.jit
def _scatter(y, first, step, share, repeat, BLOCK: tl.constexpr):
    """Lane i of a program writes i // repeat to place i // share."""
    i = tl.arange(0, BLOCK)
    tl.store(y + first + (tl.program_id(1) * step + i // share), (i // repeat).to(tl.float32))


@triton.jit
def _sum_and_store(x, y, size, BLOCK: tl.constexpr):
    """Every program reads all of x, the last one writes to its start."""
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, i < size, 0.0), 0)
    tl.store(y + i, total, (i == 0) & (tl.program_id(0) == tl.num_programs(0) - 1))


@triton.jit
def _add(x, y, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(y + shift + i, tl.load(x + i))


@triton.jit
def _read_odd_byte(x, y, BLOCK: tl.constexpr):
    odd = x.to(tl.pointer_type(tl.int8)) + 1
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(odd.to(tl.pointer_type(tl.float32)) + i))


@triton.jit
def _read_either(x, z, y, BLOCK: tl.constexpr):
    """Pointers of two tensors in one load."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(tl.where(i % 2 == 0, x + i, z + i // 2)))


@triton.jit
def _read_number(y, address):
    tl.store(y, tl.load(tl.cast(address, tl.int64).to(tl.pointer_type(tl.float32))))


def numbers(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


@contextlib.contextmanager
def fault(kernel, what: str, program=(0, 0, 0), function=None):
    """Expects one, told with its program and line, which may be of a ``function`` it calls."""
    with pytest.raises(MemoryFault) as found:
        yield
    lines, first = inspect.getsourcelines((function or kernel).fn)
    access = {"loads": "tl.load", "stores": "tl.store", "updates": "tl.atomic_add"}[what.split()[0]]
    line = first + next(i for i, text in enumerate(lines) if access in text)
    place = f"{kernel.__name__}, program {program}, test_interpreter.py:{line}"
    assert str(found.value) == f"{place}: {what}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_correct_kernel_passes(dtype):
    x, y = numbers(21, dtype=dtype), torch.zeros(21, dtype=dtype)
    _copy[(3,)](x, y, 21, 0, BLOCK=8)
    assert torch.equal(x, y)
    _copy[(3,)](x, x, 21, 0, BLOCK=8)  # in place: each program its own


def test_beyond_the_end():
    x, y = numbers(20), torch.zeros(20)
    with fault(_copy, "loads byte 80 of 'x', beyond its end at 80", (2, 0, 0), _shifted):
        _copy[(3,)](x, y, 20, 1, BLOCK=8)
    with fault(_copy, "stores byte 76 of 'y', beyond its end at 76", (2, 0, 0)):
        _copy[(3,)](x, y[:-1], 20, 0, BLOCK=8)
    with fault(_copy, "loads byte 0 of 'x', beyond its end at 0 (2 lanes)", function=_shifted):
        _copy[(1,)](x[:0], y, 2, 0, BLOCK=8)


def test_before_the_start():
    with fault(_scatter, "stores byte -8 of 'y', before its start (2 lanes)"):
        _scatter[(1, 1)](numbers(20)[4:], -2, 8, 1, 1, BLOCK=8)


def test_one_tensor_is_not_read_through_another():
    (x, z), y = numbers(2, 8), torch.zeros(8)
    with fault(_copy, "loads byte 32 of 'x', beyond its end at 32 (8 lanes)", function=_shifted):
        _copy[(1,)](x, z, 8, 8, BLOCK=8)
    _read_either[(1,)](x, z, y, BLOCK=8)
    assert y.tolist() == [0, 8, 2, 9, 4, 10, 6, 11]
    with fault(_read_either, "loads byte 8 of 'z', beyond its end at 8 (2 lanes)"):
        _read_either[(1,)](x, z[:2], y, BLOCK=8)
    with fault(_read_number, "loads address 0x1000, which is of no argument"):
        _read_number[(1,)](y, 4096)


def test_between_the_elements_of_a_view():
    x, y = numbers(4, 5)[:, :3], torch.zeros(20)
    message = "loads byte 12 of 'x', between the elements of the view"
    with fault(_copy, message, function=_shifted):
        _copy[(1,)](x, y, 4, 0, BLOCK=8)
    with fault(_copy, "loads byte 72 of 'x', beyond its end at 72", function=_shifted):
        _copy[(1,)](x, y, 1, 18, BLOCK=8)
    _copy[(1,)](x, y, 3, 15, BLOCK=8)
    assert y[:3].tolist() == [15, 16, 17]
    _copy[(1,)](x[:1].expand(7, 3), y, 3, 0, BLOCK=8)


def test_an_element_at_an_odd_address():
    with fault(_read_odd_byte, "loads byte 1 of 'x', which is no multiple of 4 (2 lanes)"):
        _read_odd_byte[(1,)](numbers(4), torch.zeros(2), BLOCK=2)


def test_programs_that_write_to_one_place():
    y = torch.zeros(40)
    message = "stores byte 0 of 'y', which program (0, 0, 0) has written (2 lanes)"
    with fault(_scatter, message, (0, 0, 1)):  # although the values are the same
        _scatter[(1, 2, 3)](y, 0, 2, 1, 8, BLOCK=2)
    with fault(_scatter, "stores byte 28 of 'y', which program (0, 0, 0) has written", (0, 1, 0)):
        _scatter[(1, 2)](y, 0, 7, 1, 1, BLOCK=8)
    _scatter[(1, 5)](y, 0, 8, 1, 1, BLOCK=8)


def test_programs_that_read_what_others_write():
    x = numbers(17)
    with fault(_copy, "stores byte 32 of 'y', which program (0, 0, 0) has read", (1, 0, 0)):
        _copy[(2,)](x, x, 16, 1, BLOCK=8)
    message = "loads byte 32 of 'x', which program (0, 0, 0) has written"
    with fault(_copy, message, (1, 0, 0), _shifted):
        _copy[(2,)](x[:16], x[1:], 16, 0, BLOCK=8)
    _sum_and_store[(1,)](x, x, 17, BLOCK=32)
    with fault(_sum_and_store, "stores byte 0 of 'y', which others have read", (2, 0, 0)):
        _sum_and_store[(3,)](x, x, 17, BLOCK=32)


def test_programs_that_take_elements_of_different_sizes():
    wide = torch.zeros(8, dtype=torch.float64)
    with fault(_sum_and_store, "stores byte 0 of 'y', which others have read", (2, 0, 0)):
        _sum_and_store[(3,)](wide, wide.view(torch.float32)[1:], 8, BLOCK=8)
    with fault(_sum_and_store, "stores byte 0 of 'y', which others have read", (2, 0, 0)):
        _sum_and_store[(3,)](wide.view(torch.float32)[1:], wide, 8, BLOCK=8)


def test_lanes_that_write_different_values_to_one_place():
    y = torch.zeros(8)
    with fault(_scatter, "stores different values to byte 0 of 'y' (4 lanes)"):
        _scatter[(1, 1)](y, 0, 8, 2, 1, BLOCK=8)
    _scatter[(1, 1)](y, 0, 8, 2, 2, BLOCK=8)
    assert y.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]


def test_atomics():
    x, y = numbers(4), torch.zeros(4)
    _add[(3,)](x, y, 0, BLOCK=4)
    assert y.tolist() == [0, 3, 6, 9]
    with fault(_add, "updates byte 16 of 'y', beyond its end at 16"):
        _add[(1,)](x, y, 1, BLOCK=4)


def test_what_nobody_has_written_is_no_number():
    x = torch.empty(100)
    new = x, torch.empty_like(x), x.new_empty(100), torch.empty_strided((10, 10), (1, 10))
    assert all(torch.isnan(y).all() for y in new)
