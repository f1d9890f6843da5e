"""Builds csrc/cuda for the CPU: the operators of CUDA as ``torch.ops.diffad_fast_emulated``.

The sources are what nvcc compiles, host code and kernels, but for what `translated` changes and for
the headers of this folder that stand in for CUDA's and for csrc/cuda/mma.h. And what of csrc/cpu is
for AMX, for processors without it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
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
    sources = [path for part in ("common", "cuda") for path in (CSRC / part).glob("*.*")]
    return _built(sanitizer or "plain", _cuda, sources, _flags(sanitizer))


def amx_library(sanitizer: str | None) -> Path:
    """``torch.ops.diffad_fast_amx.token_mlp_loop``: the C++ operator, with AMX's instructions in
    C++ too (amx.h). Needs AVX-512 with bfloat16."""
    sources = [path for part in ("common", "cpu") for path in (CSRC / part).rglob("*.*")]
    return _built(f"amx-{sanitizer or 'plain'}", _amx, sources, _flags(sanitizer))


def _flags(sanitizer: str | None) -> list[str]:
    target = re.search(r'^TORCH_TARGET = "(\w+)"', (CSRC.parent / "setup.py").read_text(), re.M)
    flags = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-Wno-unknown-pragmas", f"-DTORCH_TARGET_VERSION={target[1]}"]
    if sanitizer:
        flags += ["-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    return flags


def _built(kind: str, units: Callable, sources: list[Path], flags: list[str]) -> Path:
    """A library of what ``units`` writes into a folder: (source, flags of its own)."""
    digest = hashlib.sha256(" ".join([*COMPILER, *flags, torch.__version__]).encode())
    for path in (CSRC / "ops.cpp", *sorted(sources), *sorted(HERE.glob("*.*"))):
        digest.update(path.read_bytes())
    kind = kind.replace(",", "-")
    folder = BUILD / f"{kind}_{digest.hexdigest()[:16]}"
    result = folder / "emulated.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            for old in BUILD.glob(f"{kind}_*"):
                shutil.rmtree(old)
            folder.mkdir()
            _link(result, units(folder), flags)
    return result


def _cuda(folder: Path) -> list[tuple[Path, list[str]]]:
    shutil.copytree(CSRC / "common", folder / "common")
    shutil.copytree(CSRC / "cuda", folder / "cuda")
    shutil.copy(HERE / "mma.h", folder / "cuda")
    units = []
    # As nvcc does, which includes its header by itself.
    header = [f"-I{HERE}", "-include", "cuda_runtime.h"]
    header += ["-U_FORTIFY_SOURCE"]  # it forbids a longjmp to another stack
    for path in (CSRC / "ops.cpp", *sorted((CSRC / "cuda").glob("*.cu"))):
        unit = folder / ("cuda" if path.suffix == ".cu" else "") / f"{path.stem}.cpp"
        unit.write_text(translated(path.read_text()))
        units.append((unit, header))
    return [*units, (HERE / "emulation.cpp", header)]


def _amx(folder: Path) -> list[tuple[Path, list[str]]]:
    cpu, include = CSRC / "cpu", [f"-I{CSRC / 'cpu'}"]
    units = []
    for path in (CSRC / "ops.cpp", cpu / "token_mlp_loop.cpp"):
        unit = folder / f"{path.stem}.cpp"
        source = re.sub(
            r"(LIBRARY(_IMPL)?)\(diffad_fast,", r"\1(diffad_fast_amx,", path.read_text()
        )
        unit.write_text(source.replace('"../common/', f'"{CSRC}/common/'))
        units.append((unit, include))
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    avx512 += ["-mfma", "-mf16c", "-Wno-psabi"]
    amx = ["-mavx512bf16", "-D__AMX_BF16__", "-include", str(HERE / "amx.h"), "-DDIFFAD_ISA=amx"]
    return [
        *units,
        (HERE / "amx.cpp", include),
        (cpu / "kernels" / "token_mlp_loop_bf16.cpp", [*avx512, *amx]),
        (cpu / "kernels" / "token_mlp_loop.cpp", [*avx512, "-DDIFFAD_ISA=avx512"]),
    ]


def _link(result: Path, units: list[tuple[Path, list[str]]], flags: list[str]) -> None:
    home = Path(torch.__file__).parent
    flags = [*flags, "-isystem", str(home / "include")]

    def compiled(number: int) -> Path:
        unit, own = units[number]
        target = result.with_name(f"{number}.o")
        subprocess.run([*COMPILER, *flags, *own, "-c", unit, "-o", target], check=True)
        return target

    # Two at once: what test runs side by side have of a small machine.
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, range(len(units))))
    partial = result.with_suffix(".part")
    link = ["-shared", "-pthread", f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-o", partial]
    subprocess.run([*COMPILER, *flags, *objects, *link], check=True)
    partial.rename(result)


def install_amx(monkeypatch) -> None:
    """Let the CPU's token_mlp_loop be the one that reads and multiplies as for AMX."""
    _load(amx_library)
    operator = dispatch.OPERATORS["token_mlp_loop"]
    implementation = token_mlp._native(torch.ops.diffad_fast_amx.token_mlp_loop.default)
    monkeypatch.setitem(operator.implementations, "cpu", implementation)


def _load(built: Callable[[str | None], Path]) -> None:
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler: {COMPILER[0]} is not there")
    torch.ops.load_library(built(os.environ.get("DIFFAD_TEST_SANITIZER")))


def install(monkeypatch) -> None:
    """Let these operators be the CUDA ones, and the CPU their device."""
    _load(library)
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
        "token_mlp_loop": token_mlp._native(emulated.token_mlp_loop.default),
    }
    for name, implementation in implementations.items():
        operator = dispatch.OPERATORS[name]
        monkeypatch.setitem(operator.implementations, "cuda", implementation)
        if f"{name}_" in by_name or name in by_name:  # and not the C++ operators now
            monkeypatch.delitem(operator.implementations, "cpu", raising=False)
    monkeypatch.delitem(dispatch._unavailable, "cuda", raising=False)
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("cuda", "cpu", "reference"))
    monkeypatch.setattr(maps, "_largest_radius", lambda device: maps.CUDA_LARGE_RADIUS)
