"""Builds the native parts. What is where and why:

``diffad_fast/_C.abi3.so``   the operators, against PyTorch's stable ABI: not a Python module but a
                             library that ``torch.ops.load_library`` loads, good for every torch
                             from TORCH_TARGET on. Sources: csrc/ops.cpp, csrc/cpu/*.cpp,
                             csrc/cpu/kernels/*.cpp (once for each instruction set, see isa.h
                             there) and, where nvcc is found, csrc/cuda/*.cu.
``diffad_fast/_host.*.so``   the pybind11 module: csrc/module.cpp and csrc/metrics.cpp.

torch.utils.cpp_extension refuses CUDA sources beside a CPU-only torch, so the compilers are called
here. Objects stay in build/native and are rebuilt when their command or a file they include
changes.

Environment: ``DIFFAD_FAST_CUDA`` = auto (default: build CUDA where nvcc is found), 1 (fail without
nvcc) or 0; ``TORCH_CUDA_ARCH_LIST``, e.g. ``8.0;9.0+PTX``; ``MAX_JOBS``; ``CUDA_HOME``; ``CXX``;
``CXXFLAGS``.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
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
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] += ["-mprefer-vector-width=512"]
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
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}")
    return done.stdout


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures as in TORCH_CUDA_ARCH_LIST: ``["8.0", "10.0+PTX"]``."""
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
    return [*archs[:-1], archs[-1] + "+PTX"]


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


def up_to_date(target: Path, command: list[str]) -> bool:
    """Was ``target`` made by ``command`` from files that have not changed since?"""
    note, dependencies = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and dependencies.exists() and note.exists()):
        return False
    if note.read_text() != shlex.join(command):
        return False
    files = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime
    return all(os.path.exists(f) and os.path.getmtime(f) <= made for f in files)


def compile_all(commands: dict[Path, list[str]]) -> None:
    """Run the compile commands (object -> command) that are out of date, MAX_JOBS at a time."""

    def one(target: Path, command: list[str]) -> None:
        if up_to_date(target, command):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".cmd").unlink(missing_ok=True)
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)
        target.with_suffix(".cmd").write_text(shlex.join(command))

    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        list(pool.map(one, commands, commands.values()))


class BuildNative(build_ext):
    """Compiles and links the two extensions with the commands above."""

    def build_extensions(self) -> None:
        os.chdir(ROOT)
        self.cxx = shlex.split(os.environ.get("CXX") or "c++")
        self.cxx_flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        spec = importlib.util.find_spec("torch")
        if spec is None:
            sys.exit("torch is not installed: the operators are built against its headers")
        self.torch = Path(spec.submodule_search_locations[0])
        self.nvcc = find_nvcc()
        self.archs = cuda_archs(self.nvcc) if self.nvcc else []
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        objects, link = self.operators(ext) if ext.name.endswith("_C") else self.host(ext)
        command = [*self.cxx, "-shared", *map(str, objects), "-o", str(output), *link]
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)

    def compile_command(self, compiler: list[str], source: str, flags: list[str], variant=""):
        target = OBJECTS / f"{source}{variant and '.' + variant}.o"
        dependencies = ["-MMD", "-MF", str(target.with_suffix(".d"))]
        return target, [*compiler, "-c", source, "-o", str(target), *flags, *dependencies]

    def operators(self, ext: Extension) -> tuple[list[Path], list[str]]:
        common = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(self.torch / "include")]
        entries = []
        for source in ext.sources:
            if "kernels" in Path(source).parts:
                for isa, isa_flags in ISA_FLAGS.items():
                    flags = [*self.cxx_flags, *KERNEL_FLAGS, *isa_flags, f"-DDIFFAD_ISA={isa}"]
                    entries.append(self.compile_command(self.cxx, source, flags, isa))
            elif source.endswith(".cpp"):
                flags = [*self.cxx_flags, *common]
                entries.append(self.compile_command(self.cxx, source, flags))
            elif self.nvcc:
                flags = [*NVCC_FLAGS, *gencode(self.archs), *common]
                entries.append(self.compile_command([self.nvcc], source, flags))
        commands = dict(entries)
        compile_all(commands)
        # libtorch.so depends on libtorch_cuda.so in a CUDA build of torch; --no-as-needed keeps it
        # among our dependencies, so that the weak CUDA symbols are found there.
        link = [f"-L{self.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        if self.nvcc:
            link += [f"-L{cudart_folder(self.nvcc)}", "-lcudart_static", "-ldl", "-lrt"]
            link += ["-lpthread"]
        return list(commands), link

    def host(self, ext: Extension) -> tuple[list[Path], list[str]]:
        import pybind11

        header = OBJECTS / "include" / "build_info.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        text = f'constexpr char kBuildInfo[] = R"json({json.dumps(self.build_info())})json";\n'
        if not header.exists() or header.read_text() != text:
            header.write_text(text)
        includes = [str(header.parent), pybind11.get_include(), sysconfig.get_path("include")]
        flags = [*self.cxx_flags, *(f"-I{folder}" for folder in includes)]
        commands = dict(self.compile_command(self.cxx, source, flags) for source in ext.sources)
        compile_all(commands)
        return list(commands), []

    def build_info(self) -> dict:
        return {
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
            Extension(
                "diffad_fast._C",
                sources("csrc/ops.cpp", "csrc/cpu/**/*.cpp", "csrc/cuda/*.cu"),
                depends=sources("csrc/**/*.h"),
                py_limited_api=True,  # names it .abi3.so; it does not touch Python at all
            ),
            Extension("diffad_fast._host", ["csrc/metrics.cpp", "csrc/module.cpp"]),
        ],
        cmdclass={"build_ext": BuildNative},
    )
