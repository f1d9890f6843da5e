"""Fixtures; and without a GPU, Triton's interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER_COUNT" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # Processes that test side by side share the cores, and so do those that they start.
    torch.set_num_threads(
        max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    )
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

if not torch.cuda.is_available():
    # Triton reads it at its first import, which may be torch.compile's: it comes here.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401

from diffad_fast import native, use_backend
from diffad_fast.denoisers import inference
from diffad_fast.errors import BackendError
from tests import emulation


def pytest_configure():
    """In the background of a script SIGINT is ignored, also by what is started from here, and tests
    send it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Skips what this machine has not the means for."""
    absent = {}
    if not native.loaded():
        absent["native"] = pytest.mark.skip(reason="the native library is missing")
    if not torch.cuda.is_available():
        absent["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        for name, mark in absent.items():
            if item.get_closest_marker(name):
                item.add_marker(mark)


@pytest.fixture(params=["reference", pytest.param("cpu", marks=pytest.mark.native)])
def backend(request) -> str:
    """An operator's backends on the CPU, each serving all calls of a test."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def hangups():
    """SIGHUP as outside of nohup, under which it is ignored."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _dtypes_are_not_chosen_by_time():
    """U-Nets are scored in float32 unless a test says otherwise: where a trial of a moment decides,
    two fits may differ, and in bfloat16 scores vary with the size of a batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "SMALLEST_GAIN", float("inf"))
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data: the folder in DIFFAD_DATA, or shared/data beside the repository."""
    folder = os.environ.get("DIFFAD_DATA") or Path(__file__).parents[2] / "shared" / "data"
    if not Path(folder).is_dir():
        pytest.skip(f"no real data: {folder} is not there, set DIFFAD_DATA")
    return Path(folder)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda(request, monkeypatch) -> Iterator[str]:
    """The device where the CUDA operators serve all calls of a test: a GPU, and the CPU, for which
    their sources are compiled (emulation/)."""
    with _compiled(request, monkeypatch) as device:
        yield device


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.native),
        "emulated",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def compiled(request, monkeypatch) -> Iterator[str]:
    """As `cuda`, and the device where the C++ operators do."""
    with _compiled(request, monkeypatch) as device:
        yield device


@contextlib.contextmanager
def _compiled(request, monkeypatch) -> Iterator[str]:
    if request.param == "emulated":
        if request.node.get_closest_marker("gpu"):
            pytest.skip("of a size for a GPU")
        emulation.install(monkeypatch)
    with use_backend("cpu" if request.param == "cpu" else "cuda"):
        yield "cuda" if request.param == "cuda" else "cpu"


def _selected(isa: str):
    """Select an instruction set while a test runs, skip it where this machine has it not."""
    if not native.loaded():
        pytest.skip("the native library is missing")
    before = native.cpu_isa()
    try:
        native.select_cpu_isa(isa)
    except BackendError as error:
        pytest.skip(str(error))
    try:
        yield isa
    finally:
        native.select_cpu_isa(before)


@pytest.fixture(params=native.CPU_ISAS[:3])
def cpu_isa(request) -> str:
    """Each instruction set that all C++ operators are compiled for and that this machine has."""
    yield from _selected(request.param)


@pytest.fixture(params=native.CPU_ISAS)
def cpu_isa_bf16(request, monkeypatch) -> str:
    """The same, and those with dot products of bfloat16 that token_mlp_loop is compiled for. Where
    AVX-512 has these, but no AMX is, its instructions are emulated (emulation/amx.h)."""
    isa = request.param
    if isa == "amx" and native.loaded() and native.cpu_isa() == "avx512_bf16":
        emulation.install_amx(monkeypatch)
        isa = "avx512_bf16"
    yield from _selected(isa)


@pytest.fixture
def by_threads():
    """Gives a function's result, after a comparison of those by one thread and by more: to the bit,
    unless ``assert_close`` is given another tolerance."""
    before = torch.get_num_threads()

    def result(function, rtol=0.0, atol=0.0):
        found = []
        for threads in (1, 2, 7, 7):
            torch.set_num_threads(threads)
            found.append(function())
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=rtol, atol=atol)
        return found[0]

    yield result
    torch.set_num_threads(before)


@pytest.fixture
def fenced():
    """Copies a tensor to where memory ends (or begins): a read beyond it ends the process."""
    libc, nothing, kept = ctypes.CDLL(None), 0, []

    def copy(x: torch.Tensor, end: bool) -> torch.Tensor:
        dense = x if x.is_contiguous() else x.mT  # a matrix column by column
        page, used = mmap.PAGESIZE, dense.numel() * dense.element_size()
        size = -(-used // page) * page
        area = mmap.mmap(-1, size + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for edge in (start, start + page + size):
            assert libc.mprotect(ctypes.c_void_p(edge), page, nothing) == 0
        kept.append((area, start, size + 2 * page))
        at = page + (size - used if end else 0)
        copied = torch.frombuffer(area, dtype=dense.dtype, count=dense.numel(), offset=at)
        copied = copied.view(dense.shape).copy_(dense)
        return copied if x.is_contiguous() else copied.mT

    yield copy
    for _, start, size in kept:
        libc.mprotect(ctypes.c_void_p(start), size, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.fixture
def written():
    """Tells whether all numbers of a tensor were written: new memory is full of huge ones and NaN,
    by M_PERTURB of glibc or, in asan.sh, by the sanitizer. (``use_deterministic_algorithms`` fills
    only what PyTorch's own operators allocate.)"""
    perturb, huge = -6, 0x01  # filled with the complement, 0xfe: -1.7e38 in float32

    def check(x: torch.Tensor) -> bool:
        return bool((x.abs() < 1e30).all())

    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(perturb, huge)
    try:
        # Blocks of a few numbers come back as they are.
        if any(check(torch.empty(numbers)) for numbers in (1000, 100_000)):
            pytest.skip("this C library does not fill new memory")
        yield check
    finally:
        mallopt(perturb, 0)
