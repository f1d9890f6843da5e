"""What every Triton operator shares: registration, launch, choice of configuration, compilation.

On a GPU operators are registered with ``torch.library.triton_op``, so that torch.compile sees the
kernels. Where Triton's interpreter runs them (``TRITON_INTERPRET=1`` before the first import of
triton) nothing can trace them: there they are opaque custom operators with a fake. A plain call
does not go through PyTorch's dispatcher, whose way to an operator in Python takes the host longer
than most of the kernels take the GPU; it does where anything but autograd has to see the call.

**Configurations.** A plain function gives an operator's configurations from the head size (or the
like), dtype and architecture; the first is the default. Nothing is timed unless
``DIFFAD_FAST_AUTOTUNE=1`` asks for it: another tile sums in another order, and results should
repeat bit for bit from process to process. Then Triton's autotuner tries all of them once for each
set of constants and dtypes, not for every size H, W or N, and the times are kept in Triton's
cache folder (``TRITON_CACHE_DIR``), a file for each kernel, its source, constants, dtypes,
configurations, GPU architecture and version of Triton.

**Scalars.** torch.compile declares numbers in its own way: a Python float as float64, where a plain
launch makes it a float32, and an integer that fits into 32 bits as one of these, whatever a
kernel annotates. Each kernel casts what it computes with (``tl.cast``: a 1 has no methods). Triton
compiles a kernel anew where an integer that it does not name in ``do_not_specialize`` comes to be 1
or a multiple of 16, or is one no longer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.cache import get_cache_manager

from ..ops.layout import is_channels_last

try:
    from torch._library.triton import triton_ops_to_kernels
except ImportError:  # it is PyTorch's own: another version may have none
    triton_ops_to_kernels = {}

INTERPRETED = triton.knobs.runtime.interpret
AUTOTUNE = os.environ.get("DIFFAD_FAST_AUTOTUNE") == "1" and not INTERPRETED

NAMESPACE = "diffad_fast_triton"
# Bytes of shared memory that one program may use, by compute capability; 8.6, 8.9 and 12.x, the
# consumer cards, have the least.
SHARED_MEMORY = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}
LEAST_SHARED_MEMORY = 99 << 10
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def operator(fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function, whose annotations give the schema, under its own name as
    ``torch.ops.diffad_fast_triton.<name>``. It may allocate tensors, call PyTorch and
    :func:`launch`; no argument is written to.

    ``fake`` takes the same arguments and gives results of the right shapes, dtypes and strides. The
    result is called with positional arguments; its ``register_autograd(backward, setup_context=)``
    is that of ``torch.library``.
    """

    def register(function: Callable) -> Callable:
        name = f"{NAMESPACE}::{function.__name__}"
        if INTERPRETED:
            definition = torch.library.custom_op(name, function, mutates_args=())
            definition.register_fake(fake)
        else:  # its own trace, without data, is its fake
            definition = torch.library.triton_op(name, function, mutates_args=())
            # What torch.compile keeps on disk is known by the source of an operator's kernels, for
            # which PyTorch looks in its function, not in `launch`.
            triton_ops_to_kernels[name] = [
                kernel
                for kernel in function.__globals__.values()
                if isinstance(kernel, triton.runtime.JITFunction)
            ]
        dispatched = getattr(getattr(torch.ops, NAMESPACE), function.__name__)
        differentiable: list[type[torch.autograd.Function]] = []

        def call(*args):
            if torch.compiler.is_compiling() or not _plain(args):
                return dispatched(*args)
            if not torch.is_grad_enabled() or not any(map(_requires_grad, args)):
                return function(*args)
            # Without a gradient of its own the operator says so when one is asked for.
            return differentiable[0].apply(*args) if differentiable else dispatched(*args)

        def register_autograd(backward: Callable, *, setup_context: Callable) -> None:
            definition.register_autograd(backward, setup_context=setup_context)

            def forward(ctx, *args):
                # A setup_context of its own would make PyTorch inspect the signature at each call.
                output = function(*args)
                setup_context(ctx, args, output)
                return output

            methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            differentiable.append(type(function.__name__, (torch.autograd.Function,), methods))

        call.register_autograd = register_autograd
        return functools.update_wrapper(call, function)

    return register


def _plain(args: tuple) -> bool:
    """Are these tensors of no special kind, in a call that nobody traces or transforms?"""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
        and all(map(_is_plain, args))
    )


def _is_plain(arg) -> bool:
    if isinstance(arg, list):
        return all(map(_is_plain, arg))
    if not isinstance(arg, torch.Tensor):
        return True
    # A negation that is yet to be done is the dispatcher's work.
    return type(arg) in (torch.Tensor, torch.nn.Parameter) and not arg.is_neg()


def _requires_grad(arg) -> bool:
    if isinstance(arg, list):
        return any(map(_requires_grad, arg))
    return isinstance(arg, torch.Tensor) and arg.requires_grad


def launch(kernel, configs: Sequence[triton.Config], grid: Callable, *args, **constants) -> None:
    """Run ``kernel`` on ``grid(meta)``, meta holding its arguments, in the first of ``configs`` or,
    if asked to autotune, the fastest. ``constants`` are its constexpr arguments."""
    if AUTOTUNE and len(configs) > 1:
        settings = {}
        kernel = _autotuned(kernel, tuple(constants), tuple(map(_Hashable, configs)))
    else:
        settings = _settings(configs[0])
    if not INTERPRETED and torch._C._len_torch_dispatch_stack():  # traced
        kernel = torch.library.wrap_triton(kernel)
    # Triton launches on the current device, whatever device the tensors are on.
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **settings)
    else:
        kernel[grid](*args, **constants, **settings)


def capability(device: torch.device) -> int:
    """The device's compute capability as one number, 90 for 9.0; 0 in the interpreter."""
    if INTERPRETED or device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own is made for kernels and takes the host microseconds."""
    return -(-a // b)


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that one program may use."""
    return SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)


def source(kernel, config: triton.Config, types: dict[str, str], **constants):
    """(ASTSource, options) of one variant, for ``triton.compile``; see COMPILE in the kernels.

    ``types`` names the type of every argument that is no constant ("*bf16", "i32", "fp32").
    Pointers, and integers that the kernel specialises on, count as multiples of 16, as they are
    in a tensor whose channels are.
    """
    settings = _settings(config)
    names = {p.name: p for p in kernel.params}
    constants |= {k: v for k, v in settings.items() if k in names}
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {
        (p.num,): [["tt.divisibility", 16]]
        for name, p in names.items()
        if signature[name][0] in "*i" and not p.do_not_specialize
    }
    options = {k: v for k, v in settings.items() if k not in names}
    return triton.compiler.ASTSource(kernel, signature, constants, attributes), options


def _settings(config: triton.Config) -> dict:
    # No more than these two: torch.compile does not take the others outside an autotuner.
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def dense(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` in the memory format of ``like``, contiguous or channels_last; a copy if it must."""
    last = like.ndim == 4 and is_channels_last(like)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@triton.jit
def widened(x):
    """float64 as it is, everything narrower in float32: what kernels compute in."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


def wide(x: torch.Tensor) -> torch.dtype:
    """The same of a tensor's dtype."""
    return torch.promote_types(x.dtype, torch.float32)


@functools.cache
def _autotuned(kernel, key: tuple[str, ...], configs: tuple[_Hashable, ...]):
    return _Autotuner(
        kernel, kernel.arg_names, [c.config for c in configs], list(key), None, None,
        cache_results=True,
    )  # fmt: skip


class _Autotuner(Autotuner):
    """Triton's own keeps its times too, but raises where their file is damaged."""

    def check_disk_cache(self, tuning_key, configs, bench_fn) -> bool:
        """Choose for ``tuning_key`` from the times on disk; False if ``bench_fn`` had to be called,
        which chooses from times that it takes."""
        target = triton.runtime.driver.active.get_current_target()
        key = {
            "kernel": self.fn.__name__,
            "source": self.fn.cache_key,
            "architecture": f"{target.backend} {target.arch}",
            "triton": triton.__version__,
            "arguments": repr(tuning_key),
            "configurations": [str(config) for config in configs],
        }
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        files, name = get_cache_manager(digest), f"{self.fn.__name__}.autotune.json"
        path = files.get_file(name)
        if path is not None:
            try:
                times = _times(path, key)
            except (OSError, ValueError) as error:
                warnings.warn(
                    f"the autotuner measures {self.fn.__name__} again and replaces {path}, which "
                    f"does not hold its times: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                self.configs_timings = dict(zip(configs, times, strict=True))
                self.cache[tuning_key] = configs[times.index(min(times))]
                return True
        bench_fn()
        # p50, p20 and p80 in milliseconds; infinite for a configuration that the GPU refused.
        times = [[float(t) for t in self.configs_timings[config]] for config in configs]
        files.put(json.dumps({"key": key, "milliseconds": times}), name, binary=False)
        return False


def _times(path: str, key: dict) -> list[list[float]]:
    """What the autotuner wrote into ``path`` for ``key``. Raises OSError or ValueError."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict) or content.get("key") != key:
        raise ValueError("it is not of this kernel, GPU and version of Triton")
    times = content.get("milliseconds")
    if not isinstance(times, list) or len(times) != len(key["configurations"]):
        raise ValueError("it has not one entry for each configuration")
    if not all(isinstance(t, list) and t and all(isinstance(x, float) for x in t) for t in times):
        raise ValueError("its entries are not lists of times")
    return times


class _Hashable:
    """A configuration as part of a key."""

    def __init__(self, config: triton.Config):
        self.config = config
        self.text = str(config)

    def __hash__(self):
        return hash(self.text)

    def __eq__(self, other):
        return self.text == other.text
