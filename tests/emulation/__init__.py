"""Builds csrc/cuda for the CPU: the operators of CUDA as ``torch.ops.diffad_fast_emulated``.

The sources are what nvcc compiles, host code and kernels, but for what `translated` changes and for
the headers of this folder that stand in for CUDA's and for csrc/cuda/mma.h.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from diffad_fast.ops import diffusion, dispatch, finish, maps, noise, token_mlp

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "emulation"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
LAUNCH = re.compile(r"(\w+(?:<[\w\s,]+>)?)\s*<<<(.*?),[^,]*?>>>\s*\(", re.S)
CHANGES = (
    (r"LIBRARY_IMPL\(diffad_fast, CUDA,", "LIBRARY_IMPL(diffad_fast_emulated, CPU,"),
    (r"LIBRARY\(diffad_fast,", "LIBRARY(diffad_fast_emulated,"),
    # All are on the CPU: what a caller has on the host is one number.
    (r"x && x->is_cpu\(\)", "x && x->dim() == 0"),
    (r"s\.device\(\) == x\.device\(\)", "s.numel() > 1 && (s.stride(0) || s.stride(1))"),
    (r"const torch::stable::accelerator::DeviceGuard guard\(.*?\);", ""),
    (r"extern __shared__ __align__\(\d+\) (\w+) shared\[\];",
     r"auto* const shared = reinterpret_cast<\1*>(emulated::dynamic_shared);"),
)  # fmt: skip


def translated(source: str) -> str:
    """A file of CUDA as C++: launches as calls, shared memory whose size a launch gives, and no
    devices."""
    for pattern, replacement in CHANGES:
        source = re.sub(pattern, replacement, source)
    while found := LAUNCH.search(source):
        kernel, configuration = found.groups()
        start, end, depth = found.end(), found.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        call = f"emulated::launch({configuration}, [=] {{ {kernel}({source[start:end]}; }})"
        source = source[: found.start()] + call + source[end:]
    return source


def library(sanitizer: str | None) -> Path:
    """The library for the present sources, built once for all processes. Needs a C++ compiler."""
    folders = CSRC / "common", CSRC / "cuda", HERE
    sources = [path for folder in folders for path in sorted(folder.glob("*.*"))]
    target = re.search(r'^TORCH_TARGET = "(\w+)"', (CSRC.parent / "setup.py").read_text(), re.M)
    flags = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-Wno-unknown-pragmas", f"-DTORCH_TARGET_VERSION={target[1]}"]
    if sanitizer:
        flags += ["-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    digest = hashlib.sha256(" ".join([*COMPILER, *flags, torch.__version__]).encode())
    for path in (CSRC / "ops.cpp", *sources):
        digest.update(path.read_bytes())
    kind = (sanitizer or "plain").replace(",", "-")
    folder = BUILD / f"{kind}_{digest.hexdigest()[:16]}"
    result = folder / "emulated.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            for old in BUILD.glob(f"{kind}_*"):
                shutil.rmtree(old)
            _build(folder, result, flags)
    return result


def _build(folder: Path, result: Path, flags: list[str]) -> None:
    shutil.copytree(CSRC / "common", folder / "common")
    shutil.copytree(CSRC / "cuda", folder / "cuda")
    shutil.copy(HERE / "mma.h", folder / "cuda")
    units = []
    for path in (CSRC / "ops.cpp", *sorted((CSRC / "cuda").glob("*.cu"))):
        units.append(folder / ("cuda" if path.suffix == ".cu" else "") / f"{path.stem}.cpp")
        units[-1].write_text(translated(path.read_text()))
    home = Path(torch.__file__).parent
    # As nvcc does, which includes its header by itself.
    flags = [*flags, f"-I{HERE}", "-include", "cuda_runtime.h", "-isystem", home / "include"]

    def compiled(unit: Path) -> Path:
        target = folder / f"{unit.stem}.o"
        subprocess.run([*COMPILER, *flags, "-c", unit, "-o", target], check=True)
        return target

    # Two at once: what test runs side by side have of a small machine.
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*units, HERE / "emulation.cpp"]))
    partial = result.with_suffix(".part")
    link = ["-shared", "-pthread", f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-o", partial]
    subprocess.run([*COMPILER, *flags, *objects, *link], check=True)
    partial.rename(result)


def install(monkeypatch) -> None:
    """Let these operators be the CUDA ones, and the CPU their device."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler: {COMPILER[0]} is not there")
    torch.ops.load_library(library(os.environ.get("DIFFAD_TEST_SANITIZER")))
    emulated = torch.ops.diffad_fast_emulated
    by_name = ("ddim_step", "ddim_finish", "philox_normal_", "ddim_loop_step_")
    for name in by_name:  # Python's functions look these up
        monkeypatch.setattr(torch.ops.diffad_fast, name, getattr(emulated, name), raising=False)
    implementations = {
        "anomaly_map": partial(maps._native, emulated.anomaly_map.default),
        "ddim_finish": finish._native,
        "ddim_step": diffusion._native_ddim_step,
        "haar_pack": emulated.haar_pack.default,
        "haar_unpack": emulated.haar_unpack.default,
        "philox_normal": noise._native_philox_normal,
        "q_sample": emulated.q_sample.default,
        "token_mlp_loop": token_mlp._ADAPTED["cuda"](emulated.token_mlp_loop.default),
    }
    for name, implementation in implementations.items():
        operator = dispatch.OPERATORS[name]
        monkeypatch.setitem(operator.implementations, "cuda", implementation)
        if f"{name}_" in by_name or name in by_name:  # and not the C++ operators now
            monkeypatch.delitem(operator.implementations, "cpu", raising=False)
    monkeypatch.delitem(dispatch._unavailable, "cuda", raising=False)
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("cuda", "cpu", "reference"))
    monkeypatch.setattr(maps, "_largest_radius", lambda device: maps.CUDA_LARGE_RADIUS)
