from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import diffad_fast
from diffad_fast import native
from diffad_fast.errors import BackendError
from diffad_fast.version import digest_of_sources

ROOT = Path(__file__).parents[1]


def python(*args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def library() -> Path:
    return Path(native.__file__).with_name("_C.abi3.so")


def copy_without_library(folder: Path) -> None:
    package = Path(diffad_fast.__file__).parent
    shutil.copytree(
        package, folder / "diffad_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )


@pytest.fixture
def setup():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("diffad_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Run in a copy: the finder of an editable install would lead back to the original.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
"""


@pytest.mark.native
def test_build_info():
    build = diffad_fast.info()["build"]
    assert set(build) == {"sources", "compiler", "flags", "torch", "cuda", "cuda_archs", "nvcc"}
    assert "-O3" in build["flags"]
    for unwanted in ("-march=native", "-ffast-math", "-Ofast"):
        assert unwanted not in build["flags"]
    assert build["cuda"] == bool(build["cuda_archs"]) == bool(build["nvcc"])


@pytest.mark.native
def test_the_library_holds_what_build_info_says():
    def registered(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key("diffad_fast::haar_pack", key)

    assert registered("CPU") and registered("Meta") and registered("Autograd")
    cuda = diffad_fast.info()["build"]["cuda"]
    assert registered("CUDA") == cuda
    # The images of the architectures sit in a section of their own.
    assert (b".nv_fatbin" in library().read_bytes()) == cuda


@pytest.mark.native
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_library_needs_no_cuda_to_load():
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library()], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    kind = {line.split()[-1]: line.split()[-2] for line in symbols if line}
    stream = "aoti_torch_get_current_cuda_stream"
    if diffad_fast.info()["build"]["cuda"]:
        assert kind[stream] == "w"
    strong = {name for name in kind if kind[name] == "U"}
    strong -= {"aoti_torch_device_type_cuda"}  # a number, which a CPU-only torch tells too
    assert not [name for name in strong if "cuda" in name.lower() or name.startswith("cu")]
    # The stable ABI is C: no C++ symbol of torch may be needed.
    assert not [name for name in strong if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))]


@pytest.mark.native
def test_the_instruction_set_of_the_environment(monkeypatch):
    ask = "from diffad_fast import native, ops; print(native.cpu_isa())"
    assert python("-c", ask, DIFFAD_FAST_CPU="default").stdout.strip() == "default"

    def loaded_with(isa: str) -> str:
        monkeypatch.setenv("DIFFAD_FAST_CPU", isa)
        native._load.__wrapped__(lambda *_: None)
        return native.cpu_isa()

    best = native.cpu_isa()
    try:
        for isa in native.CPU_ISAS[1:]:
            try:
                assert loaded_with(isa) == isa
            except BackendError as error:
                assert f"this processor cannot run instruction set '{isa}'" in str(error)
        with pytest.raises(BackendError, match="set 'sse2': set DIFFAD_FAST_CPU to default"):
            loaded_with("sse2")
    finally:
        native.select_cpu_isa(best)


def test_cuda_on_request_without_nvcc_fails():
    bare = str(Path(sys.executable).parent)
    if shutil.which("nvcc", path=bare):
        pytest.skip("nvcc lies beside python")
    done = python("setup.py", "--version", DIFFAD_FAST_CUDA="1", PATH=bare, CUDA_HOME="")
    assert done.returncode == 1
    assert "DIFFAD_FAST_CUDA=1 asks for the CUDA operators, but there is no nvcc" in done.stderr
    done = python("setup.py", "--version", DIFFAD_FAST_CUDA="yes", PATH=bare)
    assert done.returncode == 1 and "DIFFAD_FAST_CUDA='yes' is not known" in done.stderr
    done = python("setup.py", "--version", DIFFAD_FAST_CUDA="auto", PATH=bare, CUDA_HOME="")
    assert done.returncode == 0 and done.stdout.split()[-1] == diffad_fast.__version__


def test_cuda_architectures(setup, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;10.0+PTX")
    archs = setup.cuda_archs("nvcc", in_place=True)
    assert archs == ["8.0", "9.0a", "10.0+PTX"]
    assert setup.gencode(archs) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="'Hopper' is not of the form 9.0"):
        setup.cuda_archs("nvcc", in_place=False)
    # An nvcc that is older than the newest default.
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(setup, "output_of", lambda command: "sm_80\nsm_90\n")
    assert setup.cuda_archs("nvcc", in_place=False) == ["8.0", "9.0+PTX"]
    # In place: this machine's GPUs, as far as nvcc knows them; without any, PTX for all.
    for here, expected in (
        (["9.0"], ["9.0"]),
        (["8.0", "9.0"], ["8.0", "9.0"]),
        (["12.0"], ["8.0", "9.0+PTX"]),
        ([], ["8.0+PTX"]),
    ):
        monkeypatch.setattr(setup, "gpu_archs", lambda here=here: here)
        assert setup.cuda_archs("nvcc", in_place=True) == expected


def test_environments_share_objects(setup, tmp_path):
    """What an include folder holds is noted, not where it is; another version or flag rebuilds."""
    target, source, runs = tmp_path / "a.o", tmp_path / "a.cpp", tmp_path / "runs"
    source.write_text("")
    script = f'echo "$0" >> {runs}; touch {target}; echo "{target}: {source}" > {tmp_path}/a.d'

    def build(folder, version, *flags):
        setup.compile_all({target: ["sh", "-c", script, folder, *flags]}, {folder: version})
        return runs.read_text().split()

    assert build("/one/include", "torch==2.11") == ["/one/include"]
    assert build("/two/include", "torch==2.11") == ["/one/include"]
    assert build("/two/include", "torch==2.12") == ["/one/include", "/two/include"]
    assert len(build("/one/include", "torch==2.12", "-O1")) == 3
    os.utime(source, (2**32, 2**32))
    assert len(build("/one/include", "torch==2.12", "-O1")) == 4


@pytest.mark.parametrize("package", ["torch", "pybind11"])
def test_a_build_without_headers_names_the_package(package, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util; found = util.find_spec\n"
        f"util.find_spec = lambda name, *_: None if name == {package!r} else found(name, *_)"
    )
    out = ["-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)]
    done = python("setup.py", *out, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and f"pip install {package}" in done.stderr, done.stderr


def test_a_compiler_that_fails_ends_the_build_in_a_sentence(setup, tmp_path):
    with pytest.raises(SystemExit, match="^sh failed, see above: .* GCC 12"):
        setup.compile_all({tmp_path / "a.o": ["sh", "-c", "exit 3"]}, {})
    assert not (tmp_path / "a.cmd").exists()


def test_works_without_the_native_library(tmp_path):
    copy_without_library(tmp_path)
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, diffad_fast
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(diffad_fast.ops.haar_unpack(diffad_fast.ops.haar_pack(x, 2), 2), x)
    info = diffad_fast.info()
ours = [str(w.message) for w in caught if "diffad_fast" in str(w.message)]
assert len(ours) == 1 and "slower reference backend" in ours[0], ours
assert info["build"] is None and {"cpu", "cuda"} <= set(info["unavailable"]), info
assert info["operators"]["haar_pack"]["cpu"] == "reference", info
try:
    diffad_fast.use_backend("cpu").__enter__()
except diffad_fast.errors.BackendError as error:
    assert "missing" in str(error)
else:
    raise AssertionError("a missing backend was accepted")
print(diffad_fast.__file__)
"""
    done = python("-c", NO_EDITABLE + code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "diffad_fast" / "__init__.py")


def test_a_library_that_does_not_load_is_reported(tmp_path):
    copy_without_library(tmp_path)
    (tmp_path / "diffad_fast" / "_C.abi3.so").write_bytes(b"not a library")
    done = python("-c", NO_EDITABLE + "import diffad_fast.ops", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1 and "does not load" in done.stderr


@pytest.mark.native
def test_a_library_of_other_sources_is_reported(tmp_path, monkeypatch):
    assert native.SOURCES == Path(diffad_fast.__file__).parents[1] / "csrc"
    sources = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert digest_of_sources(sources) == native.build_info()["sources"]
    monkeypatch.setattr(native, "SOURCES", sources)

    def told() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert native._load.__wrapped__(lambda *_: None)
        return [str(warning.message) for warning in caught]

    assert not told()
    schemas = sources / "ops.cpp"
    schemas.write_text(schemas.read_text().replace("int level", "int depth"))
    (message,) = told()
    assert "was built from other sources than" in message
    shutil.rmtree(sources)
    assert not told()


def test_sources_have_another_digest_when_edited_renamed_or_added(tmp_path):
    (tmp_path / "cpu").mkdir()
    header = tmp_path / "cpu" / "a.h"
    header.write_text("1")
    digests = [digest_of_sources(tmp_path)]
    header.write_text("2")
    digests.append(digest_of_sources(tmp_path))
    header = header.rename(tmp_path / "cpu" / "b.h")
    digests.append(digest_of_sources(tmp_path))
    (tmp_path / "new.cu").touch()
    digests.append(digest_of_sources(tmp_path))
    assert len(set(digests)) == 4
    (tmp_path / "notes.txt").touch()
    assert digest_of_sources(tmp_path) == digests[-1]


def test_import_is_light():
    code = """
import sys, torch
before = set(sys.modules)
import diffad_fast
heavy = {"PIL", "scipy", "sklearn", "matplotlib", "tqdm", "pywt", "skimage", "safetensors"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_kernels_import_under_the_package():
    import diffad_fast.kernels

    assert Path(diffad_fast.kernels.__file__).parent.name == "kernels"
