"""How Triton operators are registered: what torch.compile and the compilers get to see."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffad_fast import ops, use_backend
from diffad_fast.ops import dispatch

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    "triton" in dispatch.unavailable(), reason=dispatch.unavailable().get("triton", "")
)
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if "triton" not in dispatch.unavailable():
    from diffad_fast.kernels import registration
# What a GPU is asked for is given by hand: traced and compiled without one.
PREAMBLE = "import torch, triton, diffad_fast.kernels.wavelet_attention as wa\n"


def run(code: str, **environment: str) -> str:
    """Output of ``code`` in a process where kernels are compiled, not interpreted."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("autotune", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_torch_compile_sees_the_kernels(autotune):
    code = """
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
wa.capability = lambda device: 90

def kernels(function, *args):
    code = make_fx(dispatch_functionalize(function))(*args).code
    print(code.count("triton_kernel_wrapper_functional("))

with FakeTensorMode():
    x = torch.empty(2, 8, 8, 4, 32).permute(0, 3, 1, 2, 4)
    for gain in ([torch.empty(4, 4)], []):
        def forward(q, *g):
            g = g[0] if g else None
            return wa.wavelet_attention_forward(q, q, q, g, g, 1, 0.1, True)
        def backward(q, u, lse, *g):
            g = g[0] if g else None
            return wa.wavelet_attention_backward(u, q, q, q, u, lse, g, g, 1, 0.1)
        kernels(forward, x, *gain)
        out, mixed, lse = forward(x, *gain)
        kernels(backward, x, out, lse, *gain)
"""
    assert run(code, DIFFAD_FAST_AUTOTUNE=autotune).split() == ["1", "2", "1", "2"]


@pytest.mark.slow
def test_packets_are_one_kernel_each():
    code = """
import diffad_fast.kernels.haar as haar
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

def kernels(function, *args):
    code = make_fx(dispatch_functionalize(function))(*args).code
    print(code.count("triton_kernel_wrapper_functional("))

with FakeTensorMode():
    x, y, m = torch.empty(2, 1, 8, 8), torch.empty(2, 16, 2, 2), torch.empty(16)
    t, table = torch.zeros(2, dtype=torch.int64), torch.empty(9, dtype=torch.float64)
    kernels(lambda x: haar.haar_pack(x, 2), x)
    kernels(lambda y: haar.haar_unpack(y, 2), y)
    kernels(lambda x, m: haar.standardised_packet(x, m, m, 2), x, m)
    kernels(
        lambda x, m, t, y, a: haar.noised_packet(x, m, m, t, y, a, 2, "v_prediction", 5.0),
        x, m, t, y, table,
    )
"""
    assert run(code).split() == ["1"] * 4


def test_configurations():
    """Few, and every BLOCK_M holds whole groups of partial sums."""
    from diffad_fast.kernels import wavelet_attention as wa

    sizes = itertools.product(
        (80, 86, 90, 100, 120), wa.TILES, (torch.bfloat16, torch.float32), (16, 64, 128, 256, 512)
    )
    for capability, kernel, dtype, channels in sizes:
        found = wa.configurations(kernel, channels, dtype, capability)
        assert 1 <= len(found) <= 4
        for c in found:
            m, n = c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"]
            assert m % 16 == 0 and n % 16 == 0 and c.num_warps in (4, 8), c


# In place of a GPU: a driver that names an architecture, and kernels that are only counted. The
# fourth configuration is the fastest, but on another architecture the first.
AUTOTUNE = """
import pathlib, warnings
from triton.backends.compiler import GPUTarget
from diffad_fast.kernels import registration

class Driver:
    arch = 90
    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

launched, timed = [], []

def count(kernel, *args, grid, warmup=False, **settings):
    launched.append((settings["BLOCK_M"], settings["num_warps"]))

def bench(call, quantiles):
    call()
    timed.append(launched.pop())
    fast = timed[-1] == ((64, 4) if Driver.arch == 90 else (128, 4))
    return [1.0 if fast else 2.0] * 3

triton.runtime.driver.set_active(Driver())
triton.runtime.jit.JITFunction.run = count
registration._Autotuner.do_bench = property(lambda self: bench)
wa.capability = lambda device: Driver.arch

def attend(n=1, side=8, d=16, dtype=torch.float16):
    timed.clear(), launched.clear()
    q = torch.zeros(n, 2, side, side, d, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.ops.diffad_fast_triton.wavelet_attention_forward(q, q, q, None, None, 1, 0.1, False)
    return launched, len(timed), [str(w.message) for w in caught]

def files():
    return set(pathlib.Path(os.environ["TRITON_CACHE_DIR"]).rglob("*autotune*"))

def restart():
    registration._autotuned.cache_clear()
"""


def test_autotuning_keeps_what_it_measured(tmp_path):
    code = """
import os
assert registration.AUTOTUNE  # only on demand: without, the first one, and no file
registration.AUTOTUNE = False
assert attend() == ([(128, 4)], 0, []) and not files()
registration.AUTOTUNE = True
assert attend() == ([(64, 4)], 4, [])
(first,) = files()
for other in (dict(n=3), dict(side=12)):  # in the key is no size, but whether tiles cover it
    assert attend(**other) == ([(64, 4)], 0, [])
for other in (dict(d=32), dict(dtype=torch.bfloat16)):
    assert attend(**other)[1:] == (4, [])
assert len(files()) == 3
restart()
assert attend() == ([(64, 4)], 0, [])
restart()
Driver.arch = 100
assert attend() == ([(128, 4)], 4, []) and len(files()) == 4
Driver.arch = 90
triton.__version__ += "+other"
restart()
assert attend()[1:] == (4, []) and len(files()) == 5
triton.__version__ = triton.__version__.removesuffix("+other")

good = first.read_text()
(foreign,) = [f for f in files() if "cuda 100" in f.read_text()]
damaged = {
    good[: len(good) // 2]: "",
    "[]": "not of this kernel",
    foreign.read_text(): "not of this kernel",
    good.replace('"milliseconds": [', '"milliseconds": [[1.0], '): "one entry for each",
    good.replace("2.0, 2.0", "null"): "not lists of times",
}
for text, why in damaged.items():
    assert text != good
    first.write_text(text)
    restart()
    launched_, measured, (message,) = attend()
    assert launched_ == [(64, 4)] and measured == 4, text
    assert str(first) in message and why in message, message
    assert first.read_text() == good

first.unlink()  # nothing half-written: the file appears in one move, whole
restart()
replace = os.replace
def interrupted(source, target):
    assert str(target) == str(first) and pathlib.Path(source).read_text() == good
    raise OSError("disk full")
os.replace = interrupted
try:
    attend()
    raise SystemExit("it was written")
except OSError:
    pass
os.replace = replace
assert not first.exists()
print("done")
"""
    out = run(AUTOTUNE + code, DIFFAD_FAST_AUTOTUNE="1", TRITON_CACHE_DIR=str(tmp_path))
    assert out.split() == ["done"]


@pytest.mark.slow
@pytest.mark.parametrize("capability, instruction", [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_kernels_compile_to_matrix_instructions(capability, instruction):
    code = f"""
from triton.backends.compiler import GPUTarget
make = wa.COMPILE["forward, level 1, d 64, bf16"]
source, options = make({capability})
done = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=options)
print(done.asm["ptx"].count("{instruction}"), done.metadata.shared)
"""
    count, shared = map(int, run(code).split())
    assert count >= 16 and shared <= {80: 163, 90: 227}[capability] << 10


def test_compiled_graphs_on_disk_are_known_by_the_kernels():
    code = """
import importlib, pkgutil
import diffad_fast.kernels
from torch._library.triton import get_triton_kernels_for_op
for module in pkgutil.iter_modules(diffad_fast.kernels.__path__):
    importlib.import_module(f"diffad_fast.kernels.{module.name}")
for name in dir(torch.ops.diffad_fast_triton):
    found = get_triton_kernels_for_op(f"diffad_fast_triton::{name}")
    if hasattr(getattr(torch.ops.diffad_fast_triton, name), "default"):
        assert found, name
        if name.startswith("wavelet_attention"):
            assert {"_forward", "_backward_queries", "_backward_keys"} <= {
                k.__name__ for k in found
            }
        print(name)
"""
    assert len(run(code).split()) > 10


def test_an_integer_of_1_is_a_constant_to_torch_compile():
    """Sizes and strides that are 1 have no methods then."""
    code = """
import importlib, pkgutil
import diffad_fast.kernels
from triton.backends.compiler import GPUTarget
done = set()
for module in pkgutil.iter_modules(diffad_fast.kernels.__path__):
    module = importlib.import_module(f"diffad_fast.kernels.{module.name}")
    for make in getattr(module, "COMPILE", {}).values():
        source, options = make(90)
        kernel, types = source.fn, dict(source.signature)
        if kernel in done:
            continue
        done.add(kernel)
        # Height and width of what is cut into blocks are no less than a block's.
        ones = {k for k, t in types.items() if t in ("i32", "i64") and k not in ("H", "W")}
        types |= dict.fromkeys(ones, "constexpr")
        place = {p.name: (p.num,) for p in kernel.params}
        constants = {**source.constants, **{place[k]: 1 for k in ones}}
        of_ones = {place[k] for k in ones}
        attributes = {k: v for k, v in source.attrs.items() if k not in of_ones}
        source = triton.compiler.ASTSource(kernel, types, constants, attributes)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(kernel.__name__)
"""
    assert len(run(code).split()) > 10


def test_numbers_as_torch_compile_declares_them_change_no_dtype():
    """Floats of 64 bits and integers of 32, whatever a kernel annotates."""
    code = """
import importlib, pkgutil, re
from collections import Counter
import diffad_fast.kernels
from triton.backends.compiler import GPUTarget
from triton._C.libtriton import ir

target = GPUTarget("cuda", 90, 32)
backend = triton.compiler.compiler.make_backend(target)

def ttir(source, options, types):
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = triton.compiler.ASTSource(source.fn, types, source.constants, source.attrs)
    options = backend.parse_options(options)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(source.make_ir(target, options, *functions, context))

def products(text):
    return Counter(re.findall(r"arith.muli .* : (\\S+)", text))

variants = {}  # the last one for each set of a kernel's switches
for module in pkgutil.iter_modules(diffad_fast.kernels.__path__):
    module = importlib.import_module(f"diffad_fast.kernels.{module.name}")
    for name, make in getattr(module, "COMPILE", {}).items():
        source, options = make(90)
        switches = (c for c in source.constants.values() if c is None or isinstance(c, bool))
        variants[source.fn, *switches] = name, source, options
for name, source, options in variants.values():
    types = {k: "*fp32" if t == "*fp64" else t for k, t in source.signature.items()}
    declared = {k: {"fp32": "fp64", "i64": "i32"}.get(t, t) for k, t in types.items()}
    if declared == types:
        continue
    compiled = ttir(source, options, declared)
    assert "xf64" not in compiled, name
    if "i64" in types.values():
        found, wanted = products(compiled), products(ttir(source, options, types))
        assert found == wanted, (name, found, wanted)
    print(source.fn.__name__)
"""
    assert len(run(code).split()) > 10


def names_of(call) -> set[str]:
    """The operators that PyTorch's dispatcher sees during ``call``."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return {event.name for event in profile.function_events}


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_plain_call_does_not_go_through_the_dispatcher():
    from diffad_fast.kernels.haar import haar_pack, standardise_packet

    x = torch.randn(1, 1, 4, 4, device=DEVICE)
    name = "diffad_fast_triton::haar_pack"
    assert name not in names_of(lambda: haar_pack(x, 1))
    assert name not in names_of(lambda: haar_pack(x.clone().requires_grad_(), 1).sum().backward())
    with Seen():
        assert name in names_of(lambda: haar_pack(x, 1))
    gradients = []
    for pack in (haar_pack, torch.ops.diffad_fast_triton.haar_pack):
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(pack(leaf, 1).square().sum(), leaf)
    assert torch.equal(*gradients)
    negative = torch.complex(x, x).conj().imag  # a view whose sign the dispatcher turns
    assert negative.is_neg() and torch.equal(haar_pack(negative, 1), -haar_pack(x, 1))
    # An operator without a gradient says so instead of giving a constant.
    statistics = torch.ones(4, device=DEVICE)
    result = standardise_packet(x.clone().requires_grad_(), 0 * statistics, statistics, 1)
    with pytest.raises(RuntimeError, match="standardise_packet"):
        result.sum().backward()


@pytest.mark.slow
def test_tiles_fit_into_shared_memory():
    """As compiled: matrix units of sm_100 have intermediate tiles there, too."""
    code = """
from diffad_fast.kernels import registration
from triton.backends.compiler import GPUTarget
for name, make in wa.COMPILE.items():
    for arch in (80, 90, 100):
        source, options = make(arch)
        done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        if done.metadata.shared > registration.shared_memory(arch):
            print(name, arch, done.metadata.shared)
"""
    assert run(code) == ""


@pytest.mark.skipif(not dispatch.INTERPRETER, reason="interpreted kernels")
def test_numpy_numbers_are_taken():
    """Operators convert them: kernels do not know their types."""
    x, grids = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 4, 4)
    mean, deviation = torch.zeros(16), torch.ones(16)
    t, table = torch.tensor([3, 7]), torch.linspace(0.99, 0.1, 10)
    q = torch.randn(1, 1, 4, 4, 8)
    calls = {
        "group_norm_silu": lambda i, f: ops.group_norm_silu(x, i(2), eps=f(1e-5)),
        "haar_pack": lambda i, f: ops.haar_pack(x, i(1)),
        "haar_unpack": lambda i, f: ops.haar_unpack(grids, i(2)),
        "standardised_packet": lambda i, f: ops.standardised_packet(x, mean, deviation, i(1)),
        "noised_target": lambda i, f: ops.noised_target(x, t, x, table, snr_limit=f(5.0)),
        "anomaly_map": lambda i, f: ops.anomaly_map(
            x, -x, weights=(f(1.0), f(0.0), f(2.0)), levels=i(1), sigma=f(1.0), top=f(0.1)
        ),
        "wavelet_attention": lambda i, f: ops.wavelet_attention(q, q, q, level=i(1), scale=f(0.5)),
    }
    with use_backend("triton"):
        for name, call in calls.items():
            found, wanted = call(np.int64, np.float64), call(int, float)
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, wanted)),
                            strict=True):  # fmt: skip
                assert torch.equal(a, b), name


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device."""
    current, launched = [0], []

    @contextlib.contextmanager
    def switched(device):
        current.append(device.index)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(current[-1])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switched)
    with FakeTensorMode():
        for device in ("cuda:1", "cuda:0", "cpu"):
            x = torch.empty(4, device=device)
            monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
            registration.launch(Kernel(), [triton.Config({})], lambda meta: (1,), 3, x)
    assert launched == [1, 0, 0]
