"""What a result must say of where it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import peers


def describe(device: torch.device | None = None) -> dict:
    """Machine, versions, commit, settings of PyTorch and the state of the clocks."""
    now = datetime.datetime.now()
    cuda = torch.cuda.is_available() and (device is None or device.type == "cuda")
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "date": now.date().isoformat(),
        "time": now.strftime("%H:%M"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_features": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "numpy", "diffad_fast")}
        | peers.versions(),
        "absent_peers": peers.absent(),
        "commit": _commit(),
        "settings": {
            "tf32": products.allow_tf32 or convolutions.allow_tf32,
            "cudnn_tf32": convolutions.allow_tf32,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "clock": _gpu_clock() if cuda else _cpu_clock(),
    }


def slug(machine: dict) -> str:
    """A file name for the machine: its GPU, or its processor, whose name may stand for several
    generations, its vectors and cores."""
    name = machine["gpu"] or f"{machine['cpu']} {machine['cpu_features']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def cache_bytes() -> int:
    """Size of the largest cache of a core; 32 MiB where the system does not tell."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM])", path.read_text().strip()).groups()
        sizes.append(int(number) << (10 if unit == "K" else 20))
    return max(sizes[1:] or sizes)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line for line in lines if line.startswith("model name"))
        return next(names).split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cpu_clock() -> dict:
    """Clock now and its governor where the system tells them, and the load by others."""
    mhz = []
    try:
        text = Path("/proc/cpuinfo").read_text()
        mhz = [float(value) for value in re.findall(r"cpu MHz\s*: ([\d.]+)", text)]
    except OSError:
        pass
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "mhz": mhz,
        "governor": governor.read_text().strip() if governor.exists() else "not told",
        "load": list(os.getloadavg()),
    }


def _gpu_clock() -> dict:
    names = ["clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit"]
    names += ["temperature.gpu", "clocks_throttle_reasons.active", "driver_version"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    return dict(zip(names, (output(command) or "not told").split(", "), strict=False))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with "-dirty" where more than results was changed since."""
    commit = output(["git", "describe", "--always", "--abbrev=12"])
    paths = [":/", ":(top,exclude)benchmarks/results"]
    changed = output(["git", "status", "--porcelain", "--untracked-files=no", "--", *paths])
    return f"{commit}-dirty" if commit and changed else commit


def output(command: list[str]) -> str | None:
    """What a command prints, or None where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None


@contextmanager
def tf32(library) -> Iterator[None]:
    """TF32 in ``torch.backends.cudnn`` or ``torch.backends.cuda.matmul``, as long as this lasts."""
    before, library.allow_tf32 = library.allow_tf32, True
    try:
        yield
    finally:
        library.allow_tf32 = before
