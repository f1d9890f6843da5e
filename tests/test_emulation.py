"""CUDA's kernels under ThreadSanitizer, to which each CUDA thread is a thread (see emulation/)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import emulation

ROOT = Path(__file__).parents[1]
# Of every kernel one that meets all of its barriers.
TESTS = [
    "diffusion/test_loop.py::test_fused_steps_are_the_steps_of_the_cpu[emulated-dtype1-5-layout1]",
    "ops/test_diffusion.py::test_cuda_takes_numbers_of_eight[emulated-all]",
    "ops/test_finish.py::test_cuda_is_the_reference_in_float64[emulated-3-dtype0-False]",
    "ops/test_haar.py::test_cuda_agrees_with_the_reference_in_float64[emulated-3-3-dtype1]",
    "ops/test_maps.py::test_maps_on_cuda[emulated-shape2-2-layout0]",
    "ops/test_maps.py::test_scores_on_cuda[emulated-180-none-0.01]",
    "ops/test_maps.py::test_sizes_and_widths_on_cuda[emulated-size4-1.3-dtype0]",
    "ops/test_noise.py::test_cuda_is_the_reference[emulated-shape1]",
    "ops/test_token_mlp.py::test_cuda_is_the_reference[emulated-150-70-1-2-128-dtype0]",
]


pytestmark = pytest.mark.slow  # of make test-races: it takes minutes


@pytest.fixture(scope="module")
def runtime() -> str:
    """ThreadSanitizer's, which has to be there before Python."""
    if shutil.which(emulation.COMPILER[0]) is None:
        pytest.skip("no C++ compiler")
    command = [*emulation.COMPILER, "-print-file-name=libtsan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found) or watched(found, "-c", "import torch").returncode:
        pytest.skip("ThreadSanitizer does not run here")
    return found


def watched(runtime: str, *arguments: str) -> subprocess.CompletedProcess:
    """A Python process under ThreadSanitizer."""
    environment = {
        **os.environ,
        "DIFFAD_TEST_SANITIZER": "thread",
        "LD_PRELOAD": runtime,
        "OMP_NUM_THREADS": "1",  # PyTorch's OpenMP is not instrumented: its barriers are unknown
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def faulty(sanitizer: str | None, *faults: int) -> list[str]:
    """Python's arguments for kernels with faults, see emulation.cpp."""
    calls = "".join(f"; library.emulated_fault({fault})" for fault in faults)
    library = emulation.library(sanitizer)
    return ["-c", f"import torch, ctypes; library = ctypes.CDLL('{library}'){calls}"]


def test_missing_barriers_are_seen(runtime):
    """In a thread block, and of blocks that write to one place."""
    done = watched(runtime, *faulty("thread", 0, 1, 2))
    assert done.returncode == 66 and "reported 2 warnings" in done.stderr, done.stderr


def test_threads_that_wait_in_vain_are_seen():
    if shutil.which(emulation.COMPILER[0]) is None:
        pytest.skip("no C++ compiler")
    done = subprocess.run([sys.executable, *faulty(None, 3)], capture_output=True, text=True)
    assert done.returncode == 3 and "others that do not come" in done.stderr


@pytest.mark.native
def test_cuda_kernels_have_no_races(runtime):
    emulation.library("thread")
    paths = [f"tests/{test}" for test in TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = watched(runtime, "-m", "pytest", *options, *paths)
    assert done.returncode == 0 and f"{len(TESTS)} passed" in done.stdout, done.stdout + done.stderr
