"""Builds the native parts. What is where and why:

``diffad_fast/_C.abi3.so``   the operators, against PyTorch's stable ABI: not a Python module but a
                             library that ``torch.ops.load_library`` loads, good for every torch
                             from TORCH_TARGET on. Sources: csrc/ops.cpp, csrc/cpu/*.cpp,
                             csrc/cpu/kernels/*.cpp (once for each instruction set, see isa.h
                             there) and, where nvcc is found, csrc/cuda/*.cu.
``diffad_fast/_host.*.so``   the pybind11 module: csrc/module.cpp and csrc/metrics.cpp.

torch.utils.cpp_extension refuses CUDA sources beside a CPU-only torch, so the compilers are called
here. Objects stay in build/native and are rebuilt when their command, a file they include or the
version of a package with headers changes; environments with the same versions share them.

Environment: ``DIFFAD_FAST_CUDA`` = auto (default: build CUDA where nvcc is found), 1 (fail without
nvcc) or 0; ``TORCH_CUDA_ARCH_LIST``, e.g. ``8.0;9.0+PTX``; ``MAX_JOBS``; ``CUDA_HOME``; ``CXX``;
``CXXFLAGS``.

Without TORCH_CUDA_ARCH_LIST a wheel holds all of DEFAULT_ARCHS. What is built in place (``pip
install -e .``, ``build_ext --inplace``) is for the GPUs of this machine; where there is none, it
holds the oldest architecture and its PTX, from which the driver compiles for any newer one.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET = "0x020b000000000000ULL"  # torch 2.11: the oldest that the library loads into
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build", "native")

# -ffp-contract=off: the same bits whichever instruction set is chosen at run time. The two flags
# after it change no value: nobody reads errno or floating-point traps, and loops with a choice
# between two results could not be vectorised without them.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# The instruction sets that csrc/cpu/kernels is compiled for; csrc/cpu/isa.cpp chooses among them.
ISA_FLAGS = {"default_": []}
if platform.machine() in ("x86_64", "AMD64"):
    # Processors without AVX2 are from before 2013: half of the time to compile is worth more.
    ISA_FLAGS["default_"] = ["-O1"]
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] += ["-mprefer-vector-width=512"]
elif platform.machine() == "aarch64":
    # GCC's default on x86-64: scheduling before the registers are allocated spills the sums of
    # matrix products, and processors schedule themselves.
    ISA_FLAGS["default_"] = ["-fno-schedule-insns"]
# And those of its files named *_bf16.cpp, see csrc/cpu/kernels/isa.h.
BF16_ISA_FLAGS = {}
if "avx512" in ISA_FLAGS:
    BF16_ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    BF16_ISA_FLAGS["amx"] = [*BF16_ISA_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
# Kernels pass vectors to functions that are always inlined: no calling convention is involved. GCC
# 12 warns of its own AVX-512 intrinsics, which leave a masked operand undefined on purpose.
KERNEL_FLAGS = ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]


def find_nvcc() -> str | None:
    """Path of nvcc as DIFFAD_FAST_CUDA asks for it; None where no CUDA is to be built."""
    wanted = os.environ.get("DIFFAD_FAST_CUDA") or "auto"
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"DIFFAD_FAST_CUDA={wanted!r} is not known: set it to auto, 1 or 0")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None and wanted == "1":
        sys.exit(
            "DIFFAD_FAST_CUDA=1 asks for the CUDA operators, but there is no nvcc in "
            f"{'CUDA_HOME/bin' if home else 'PATH'}: install the CUDA toolkit, point CUDA_HOME at "
            "it, or set DIFFAD_FAST_CUDA=auto"
        )
    return nvcc


def output_of(command: list[str]) -> str:
    """Standard output and error of ``command``, which must succeed."""
    if shutil.which(command[0]) is None:
        sys.exit(f"{command[0]} is not installed: the operators need a C++ compiler, see CXX")
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}")
    return done.stdout


def run(command: list[str]) -> None:
    """Run a compiler, which says itself what is wrong."""
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(
            f"{command[0]} failed, see above: the operators build with GCC 12 or a current clang, "
            "which CXX may name"
        )


def cuda_archs(nvcc: str, in_place: bool) -> list[str]:
    """Architectures as in TORCH_CUDA_ARCH_LIST: ``["8.0", "10.0+PTX"]``; see the top for
    ``in_place``."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    archs = re.split(r"[;,\s]+", (given or DEFAULT_ARCHS).strip())
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: {arch!r} is not of the form 9.0, 9.0a or 9.0+PTX")
    if given:
        return archs
    # An older nvcc does not know the newest default; the last one that it knows gets the PTX,
    # from which the driver compiles for newer chips.
    known = output_of([nvcc, "--list-gpu-code"]).split()
    archs = [a.removesuffix("+PTX") for a in archs]
    archs = [a for a in archs if "sm_" + a.replace(".", "") in known]
    if not archs:
        sys.exit(f"{nvcc} knows none of {DEFAULT_ARCHS}: set TORCH_CUDA_ARCH_LIST")
    if in_place:
        here = gpu_archs()
        if here and all("sm_" + a.replace(".", "") in known for a in here):
            return here
        if not here:
            archs = archs[:1]
    return [*archs[:-1], archs[-1] + "+PTX"]


def gpu_archs() -> list[str]:
    """Architectures of the GPUs of this machine; empty without one."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return sorted(set(re.findall(r"^\d+\.\d$", done.stdout, re.M)))


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags for ``archs``."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cudart_folder(nvcc: str) -> str:
    """The folder of libcudart_static.a. nvcc may be a wrapper script, so it is asked itself."""
    text = output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    libraries = next((line for line in text.splitlines() if "LIBRARIES=" in line), "")
    for folder in re.findall(r'-L"?([^"\s]+)', libraries):
        if Path(folder, "libcudart_static.a").exists():
            return os.path.realpath(folder)
    sys.exit(f"{nvcc} names no folder with libcudart_static.a: {libraries or text}")


def package_headers(package: str, folder: str) -> dict[str, str]:
    """A folder of headers -> what is noted in its place: they are those of a version of
    ``package``, wherever it is installed."""
    return {folder: f"{package}=={importlib.metadata.version(package)}"}


def up_to_date(target: Path, made_by: str) -> bool:
    """Was ``target`` made by that command from files that have not changed since?"""
    note, dependencies = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and dependencies.exists() and note.exists()):
        return False
    if note.read_text() != made_by:
        return False
    files = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime
    return all(os.path.exists(f) and os.path.getmtime(f) <= made for f in files)


def compile_all(commands: dict[Path, list[str]], headers: dict[str, str]) -> None:
    """Run the compile commands (object -> command) that are out of date, MAX_JOBS at a time.

    ``headers``: see :func:`package_headers`.
    """

    def one(target: Path, command: list[str]) -> None:
        made_by = shlex.join(headers.get(word, word) for word in command)
        if up_to_date(target, made_by):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".cmd").unlink(missing_ok=True)
        run(command)
        target.with_suffix(".cmd").write_text(made_by)

    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not jobs.isdecimal():
        sys.exit(f"MAX_JOBS={jobs!r} is no number: set it to how many compilers may run at a time")
    with ThreadPoolExecutor(max(1, int(jobs))) as pool:
        list(pool.map(one, commands, commands.values()))


class BuildNative(build_ext):
    """Compiles and links the two extensions with the commands above."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.here = bool(self.inplace)  # setuptools hides it while it builds

    def build_extensions(self) -> None:
        os.chdir(ROOT)
        self.cxx = shlex.split(os.environ.get("CXX") or "c++")
        self.cxx_flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        for package in ("torch", "pybind11"):
            if importlib.util.find_spec(package) is None:
                sys.exit(
                    f"{package} is not installed: the native parts are built against its headers; "
                    f"pip install {package}"
                )
        self.torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
        self.nvcc = find_nvcc()
        self.archs = cuda_archs(self.nvcc, self.here) if self.nvcc else []
        # Another compiler of the same name makes other objects.
        self.headers = {self.cxx[0]: output_of([*self.cxx, "--version"])}
        # The objects of both in one go, so that no core waits for the last one of the first.
        commands = [self.host(e) if e.name.endswith("_host") else self.operators(e)
                    for e in self.extensions]  # fmt: skip
        compile_all({k: v for of_one in commands for k, v in of_one.items()}, self.headers)
        self.objects = {e.name: list(c) for e, c in zip(self.extensions, commands, strict=True)}
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = ["-pthread"] if ext.name.endswith("_host") else self.libraries_of_operators()
        command = [*self.cxx, "-shared", *map(str, self.objects[ext.name]), "-o", str(output)]
        command += link
        run(command)

    def compile_command(self, compiler: list[str], source: str, flags: list[str], variant=""):
        target = OBJECTS / f"{source}{variant and '.' + variant}.o"
        dependencies = ["-MMD", "-MF", str(target.with_suffix(".d"))]
        return target, [*compiler, "-c", source, "-o", str(target), *flags, *dependencies]

    def host(self, ext: Extension) -> dict[Path, list[str]]:
        """Compile commands of the pybind11 module, object -> command."""
        import pybind11

        header = OBJECTS / "include" / "build_info.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        text = f'constexpr char kBuildInfo[] = R"json({json.dumps(self.build_info())})json";\n'
        if not header.exists() or header.read_text() != text:
            header.write_text(text)
        self.headers |= package_headers("pybind11", pybind11.get_include())
        flags = [*self.cxx_flags, f"-I{header.parent}", "-isystem", pybind11.get_include()]
        flags += ["-isystem", sysconfig.get_path("include")]
        return dict(self.compile_command(self.cxx, source, flags) for source in ext.sources)

    def operators(self, ext: Extension) -> dict[Path, list[str]]:
        """Compile commands of the operators, object -> command, the longest first."""
        include = str(self.torch / "include")
        self.headers |= package_headers("torch", include)
        common = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", include]
        entries = []
        by_time = sorted(
            ext.sources, key=lambda s: (s.endswith(".cu"), os.path.getsize(s)), reverse=True
        )
        for source in by_time:
            if "kernels" in Path(source).parts:
                bf16 = source.endswith("_bf16.cpp")
                for isa, isa_flags in (BF16_ISA_FLAGS if bf16 else ISA_FLAGS).items():
                    flags = [*self.cxx_flags, *KERNEL_FLAGS, *isa_flags, f"-DDIFFAD_ISA={isa}"]
                    entries.append(self.compile_command(self.cxx, source, flags, isa))
            elif source.endswith(".cpp"):
                flags = [*self.cxx_flags, *common]
                entries.append(self.compile_command(self.cxx, source, flags))
            elif self.nvcc:
                flags = [*NVCC_FLAGS, *gencode(self.archs), *common]
                entries.append(self.compile_command([self.nvcc], source, flags))
        return dict(entries)

    def libraries_of_operators(self) -> list[str]:
        # libtorch.so depends on libtorch_cuda.so in a CUDA build of torch; --no-as-needed keeps it
        # among our dependencies, so that the weak CUDA symbols are found there.
        link = [f"-L{self.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        if self.nvcc:
            link += [f"-L{cudart_folder(self.nvcc)}", "-lcudart_static", "-ldl", "-lrt"]
            link += ["-lpthread"]
        return link

    def build_info(self) -> dict:
        version = runpy.run_path(str(ROOT / "diffad_fast" / "version.py"))
        return {
            "sources": version["digest_of_sources"](ROOT / "csrc"),
            "compiler": output_of([*self.cxx, "--version"]).splitlines()[0],
            "flags": shlex.join(self.cxx_flags),
            "torch": importlib.metadata.version("torch"),
            "cuda": self.nvcc is not None,
            "cuda_archs": self.archs,
            "nvcc": re.search(r"V([\d.]+)", output_of([self.nvcc, "--version"]))[1]
            if self.nvcc
            else None,
        }


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for q in patterns for p in ROOT.glob(q))


if __name__ == "__main__":
    find_nvcc()  # a bad or unmet DIFFAD_FAST_CUDA stops every command at once
    setup(
        packages=[*find_packages(include=["diffad_fast", "diffad_fast.*"]), "diffad_fast.kernels"],
        package_dir={"diffad_fast": "diffad_fast", "diffad_fast.kernels": "kernels"},
        ext_modules=[
            Extension("diffad_fast._host", ["csrc/metrics.cpp", "csrc/module.cpp"]),
            Extension(
                "diffad_fast._C",
                sources("csrc/ops.cpp", "csrc/cpu/**/*.cpp", "csrc/cuda/*.cu"),
                depends=sources("csrc/**/*.h"),
                py_limited_api=True,  # names it .abi3.so; it does not touch Python at all
            ),
        ],
        cmdclass={"build_ext": BuildNative},
    )
