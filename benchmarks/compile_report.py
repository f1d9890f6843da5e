"""What the compilers say of every kernel: registers, shared memory, spills and, of Triton's, matrix
instructions, on each architecture.

Needs nvcc, not a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import machine
from .grid import grid

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100")
MATRIX_INSTRUCTION = r"\b(?:(wgmma)\.mma_async|(tcgen05)\.mma|(mma)\.sync)\b"


def run(quick: bool, pattern: str = "") -> dict:
    """The result to write: ``kernels``, a row a kernel and architecture, and ``missing``."""
    missing = []
    kernels: list[dict] = []
    build = _build_script()
    nvcc = build.find_nvcc()
    if nvcc is None:
        missing.append("nvcc is not installed: no report of csrc/cuda/*.cu")
    else:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            if re.search(pattern, source.name):
                kernels += _cuda(build, nvcc, source, ("90",) if quick else ARCHITECTURES)
    triton = list(_triton(("90",) if quick else ARCHITECTURES, pattern, missing))
    return {
        "format": 1, "suite": "compile-report", "quick": quick, "device": "none",
        "machine": machine.describe(), "rows": [], "wrong": [],
        "nvcc": machine.output([nvcc, "--version"]) if nvcc else None,
        "kernels": kernels + triton, "missing": missing,
    }  # fmt: skip


def table(result: dict) -> list[str]:
    """A line a kernel, its architectures side by side."""
    archs = list(dict.fromkeys(k["architecture"] for k in result["kernels"]))
    rows: dict[tuple[str, str], dict[str, dict]] = {}
    for kernel in result["kernels"]:
        rows.setdefault((kernel["file"], kernel["kernel"]), {})[kernel["architecture"]] = kernel
    spilled = sum(k["spill_bytes"] > 0 for k in result["kernels"])
    lines = [*(f"Missing: {text}." for text in result["missing"]), ""]
    lines += [
        f"{len(result['kernels'])} kernels compiled, {spilled} of them spill registers to memory. "
        "Registers a thread / shared memory a block in bytes / bytes spilled (in brackets: how many"
        " of the instructions in its loops go to spilled registers) / matrix instructions in the "
        "program text (Triton alone).",
        "",
    ]
    head = ["file", "kernel", *archs]
    body = [
        [file, f"`{name}`", *(_cell(found.get(arch)) for arch in archs)]
        for (file, name), found in rows.items()
    ]
    return lines + grid(head, body)


def _cell(kernel: dict | None) -> str:
    if kernel is None:
        return ""
    cell = f"{kernel['registers']} / {kernel['shared_bytes']} / "
    if kernel["spill_bytes"]:
        cell += "**{}** ({} of {:,})".format(kernel["spill_bytes"], *kernel["spills_in_loops"])
    else:
        cell += "0"
    matrix = kernel.get("matrix_instructions", {})
    return cell + "".join(f" / {count} {name}" for name, count in matrix.items())


def _build_script():
    """setup.py as a module: its compiler flags are the ones to report on."""
    spec = importlib.util.spec_from_file_location("diffad_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cuda(build, nvcc: str, source: Path, architectures) -> Iterator[dict]:
    import torch

    include = Path(torch.__file__).parent / "include"
    for arch in architectures:
        print(f"  {source.name}, sm_{arch}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "out.cubin")
            command = [
                nvcc, "-cubin", str(source), "-o", str(cubin),
                f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", *build.NVCC_FLAGS,
                f"-DTORCH_TARGET_VERSION={build.TORCH_TARGET}", "-isystem", str(include),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stderr[-2000:]}")
            loops = spills_in_loops(_cuobjdump("-sass", str(cubin)))
        yield from parse(done.stderr, source.name, f"sm_{arch}", loops)


def parse(log: str, file: str, architecture: str, loops: dict[str, list[int]]) -> Iterator[dict]:
    """Kernels from what ``ptxas -v`` prints: three lines for each. loops: by mangled name, what
    :func:`spills_in_loops` found."""
    blocks = re.split(r"ptxas info\s*: Compiling entry function '", log)[1:]
    mangled = [block.split("'", 1)[0] for block in blocks]
    for name, symbol, block in zip(_demangled(mangled), mangled, blocks, strict=True):

        def number(pattern: str, text: str = block) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        yield {
            "file": file,
            "kernel": name,
            "architecture": architecture,
            "registers": number(r"Used (\d+) registers"),
            "shared_bytes": number(r"(\d+) bytes smem"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "spills_in_loops": loops[symbol],
        }


def spills_in_loops(sass: str) -> dict[str, list[int]]:
    """For each function of a disassembly: how many instructions in its loops read or write local
    memory, where spilled registers are, and how many instructions these loops have.

    A loop is what lies between a backward jump and its target.
    """
    found = {}
    for function in re.split(r"Function : ", sass)[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)([^;]*);", function)
        program = [(int(address, 16), name, rest) for address, name, rest in lines]
        loops = []
        for address, name, rest in program:
            target = re.search(r"0x([0-9a-f]+)\s*$", rest)
            # The jump to itself behind the last instruction ends no loop.
            if name.startswith("BRA") and target and int(target[1], 16) < address:
                loops.append((int(target[1], 16), address))
        names = [n for at, n, _ in program if any(low <= at <= high for low, high in loops)]
        spills = sum(name.startswith(("LDL", "STL")) for name in names)
        found[function.split("\n", 1)[0].strip()] = [spills, len(names)]
    return found


def _demangled(names: list[str]) -> list[str]:
    """Readable names, without the arguments of the kernel, the same for all its variants."""
    if not names or not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if len(lines) != len(names):
        return names
    kernel = r"void (?:diffad::|\(anonymous namespace\)::)*(.*?>|\w+)\("
    found = [re.match(kernel, line) for line in lines]
    return [m[1] if m else line for m, line in zip(found, lines, strict=True)]


def _triton(architectures, pattern: str, missing: list[str]) -> Iterator[dict]:
    """Kernels of ``diffad_fast.kernels``: a module names what to compile in ``COMPILE``, a dict of
    kernel name -> function of a compute capability (80) that gives what
    ``diffad_fast.kernels.registration.source`` does for the configuration used there.
    """
    try:
        package = importlib.import_module("diffad_fast.kernels")
    except ModuleNotFoundError:
        missing.append("diffad_fast.kernels is not installed: no report of kernels/")
        return
    names = [e.name for e in pkgutil.iter_modules(package.__path__) if e.name != "registration"]
    if not names:
        missing.append("there is no Triton kernel in kernels/")
        return
    try:
        import triton
        from triton.backends.compiler import GPUTarget
    except ImportError:
        missing.append("triton is not installed: no report of kernels/")
        return
    if triton.knobs.runtime.interpret:
        missing.append("TRITON_INTERPRET is set: nothing of kernels/ is compiled")
        return
    for name in names:
        if not re.search(pattern, f"{name}.py"):
            continue
        module = importlib.import_module(f"diffad_fast.kernels.{name}")
        variants = getattr(module, "COMPILE", None)
        if variants is None:
            missing.append(f"kernels/{name}.py has no COMPILE, so nothing of it was compiled")
            continue
        for kernel, variant in variants.items():
            for arch in architectures:
                print(f"  {name}.py, {kernel}, sm_{arch}", file=sys.stderr, flush=True)
                source, options = variant(int(arch))
                target = GPUTarget("cuda", int(arch), 32)
                done = triton.compile(source, target=target, options=options)
                found = ("".join(m) for m in re.findall(MATRIX_INSTRUCTION, done.asm["ptx"]))
                yield {
                    "file": f"{name}.py", "kernel": kernel, "architecture": f"sm_{arch}",
                    **_usage(done.asm["cubin"]),
                    "shared_bytes": done.metadata.shared,  # most is asked for at the launch
                    "matrix_instructions": dict(Counter(found)),
                }  # fmt: skip


def _usage(cubin: bytes) -> dict[str, object]:
    """Resources of the one kernel in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump("--dump-resource-usage", file.name)
        (loops,) = spills_in_loops(_cuobjdump("-sass", file.name)).values()

    def number(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": number("REG"), "shared_bytes": number("SHARED"),
        # Triton has no arrays of its own: all of the stack is spilled registers.
        "stack_bytes": number("STACK"), "spill_bytes": number("LOCAL") + number("STACK"),
        "spills_in_loops": loops,
    }  # fmt: skip


def _cuobjdump(*arguments: str) -> str:
    """What cuobjdump, Triton's own or the toolkit's, prints."""
    tool = "cuobjdump"
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        tool = str(bundled) if bundled.exists() else tool
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
