"""The vectors of the CPU kernels, natively and, with a cross compiler and QEMU, on aarch64."""

import platform
import runpy
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compile_command(machine: str, isa: str, monkeypatch) -> list[str]:
    """Compiler and flags of kernels for ``isa`` of ``machine``, as setup.py there has them."""
    compiler = "c++" if machine == platform.machine() else f"{machine}-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    flags = [*setup["CXX_FLAGS"], *setup["KERNEL_FLAGS"], *setup["ISA_FLAGS"][isa]]
    return [compiler, *flags, f"-DDIFFAD_ISA={isa}"]


@pytest.mark.parametrize(
    "machine, isa",
    [("x86_64", "default_"), ("x86_64", "avx2"), ("x86_64", "avx512"), ("aarch64", "default_")],
)
def test_vectors_are_plain_arithmetic(machine, isa, tmp_path, monkeypatch):
    emulator = [] if machine == platform.machine() else [f"qemu-{machine}"]
    if emulator and shutil.which(*emulator) is None:
        pytest.skip(f"no {emulator[0]}")
    command = compile_command(machine, isa, monkeypatch)
    source, program = ROOT / "tests" / "native" / "simd.cpp", tmp_path / "simd"
    whole = ["-static"] if emulator else []  # which then needs no libraries of that machine
    subprocess.run([*command, "-O1", *whole, source, "-o", program], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True)
    if done.returncode == -signal.SIGILL:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp")), ids=lambda path: path.stem
)
def test_kernels_compile_for_aarch64(source, monkeypatch):
    if source.stem.endswith("_bf16"):
        pytest.skip("of x86-64 alone")
    command = compile_command("aarch64", "default_", monkeypatch)
    subprocess.run([*command, "-fsyntax-only", source], check=True)
