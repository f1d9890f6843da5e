"""What a benchmark is: a case with its inputs, its exact result and those who compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

OURS = "diffad_fast"
"""The contender that others are compared with. Names that start with it are of our code, too."""
REFERENCE = "reference"
ONE_THREAD = "one thread"
"""The note of peers that never run on more, where ours do."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case's result."""

    run: Callable
    """Takes what ``prepare`` made of the inputs."""
    prepare: Callable[[tuple], tuple] = lambda inputs: inputs
    """Brings the inputs into the form that this contender works on, outside what is timed."""
    dtype: str = "float32"
    memory_format: str = "contiguous"
    compiled: bool = False
    """Run through torch.compile; with ``graph`` what that makes is captured."""
    graph: bool = False
    """Captured as it is in one CUDA graph, which is replayed; on a GPU alone."""
    cpu_only: bool = False
    """Leaves out this contender on a GPU."""
    tolerance: float | None = None
    """In place of the case's."""
    check: Callable[[object], str | None] | None = None
    """Where the result cannot equal the exact one (another generator, another method): gives what
    is wrong with a result, or None."""
    part: float = 1.0
    """Share of the case's work that it does, where all of it would take too long: its times are
    divided by it. The note says so."""
    note: str = ""
    """What a reader must know to compare: "another function", "approximate"."""

    def settings(self, device: torch.device) -> dict:
        """What has to stand beside its time."""
        gpu = device.type == "cuda"
        return {
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            "compiled": "default" if self.compiled else "no",
            "graph": gpu and self.graph,
            "note": self.note,
        }


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    operator: str
    name: str
    """Sizes and options; with ``operator`` it names the case for good."""
    inputs: Callable[[torch.device], tuple]
    exact: Callable[[tuple], object]
    """The result in float64, from ``inputs``."""
    contenders: Mapping[str, Contender]
    """OURS first."""
    bytes: int = 0
    """Traffic that no implementation can avoid: each input read, each output written once."""
    flops: int = 0
    """0, as ``bytes`` are, for a whole network, whose work is not counted."""
    tolerance: float = 1e-5
    """Largest difference to ``exact``, relative to its largest value."""
    rate: str | None = "float32"
    """The matrix rate that bounds the FLOPs; None where no matrix unit can do them."""
    batch: int = 1
    unit: str = "sample"
    """What ``batch`` counts, for the throughput."""
    host: bool = False
    """The result ends on the host: timed by its clock also on a GPU."""
    gradients: bool = False
    parameters: int | None = None
    """Of the network that is trained: what stays in memory between steps goes by it."""
    rounds: int | None = None
    """As many, if they take no longer than ten cases: where a difference of few per cent is to be
    seen. Default: what the time allows."""
    sweep: Mapping[str, int] = field(default_factory=dict)
    """Position on an axis along which the work grows: {"batch": 8}."""
    served_by: Callable[[str], str] | None = None
    """The backend that serves ``OURS`` on a device type, where there is a choice."""

    @property
    def key(self) -> str:
        return f"{self.operator} {self.name}"


def operator_case(
    operator: str,
    name: str,
    inputs: Callable[[torch.device], tuple],
    call: Callable,
    *,
    dtype: str = "float32",
    memory_format: str = "contiguous",
    formats: bool = True,
    peers: Mapping[str, Contender] | None = None,
    compiled: bool = True,
    graph: bool = True,
    **options,
) -> Case:
    """The case of a library operator, with the baselines that every operator has.

    ``call(functions, *inputs)`` computes the result from ``diffad_fast.ops`` or from
    ``diffad_fast.reference``. ``dtype`` is that of the matrices among the inputs, and names the
    case's rate unless ``rate`` is given. ``memory_format`` is that of our inputs; the reference
    runs on contiguous inputs, as most code gives them, and where ``formats`` on channels_last too.
    With ``graph`` these are captured on a GPU, as detectors and trainers run them, so that the time
    is the GPU's alone; peers say themselves whether they can be.
    """
    from diffad_fast import ops, reference
    from diffad_fast.ops.dispatch import OPERATORS

    contenders = {OURS: in_format(memory_format, partial(call, ops))}
    contenders[REFERENCE] = in_format("contiguous", partial(call, reference))
    if formats:
        contenders[f"{REFERENCE}, channels_last"] = in_format(
            "channels_last", partial(call, reference)
        )
    if compiled:
        contenders[f"{REFERENCE}, torch.compile"] = in_format(
            memory_format, partial(call, reference), compiled=True
        )
    contenders = {
        name: replace(one, dtype=dtype, graph=graph) for name, one in contenders.items()
    }
    contenders |= peers or {}
    return Case(
        operator,
        name,
        inputs,
        exact=lambda x: call(reference, *map_tensors(_double, x)),
        contenders=contenders,
        served_by=OPERATORS[operator].backend,
        **{"rate": dtype, **options},
    )


def by_triton(
    device_type: str, call: Callable, memory_format: str = "contiguous"
) -> dict[str, Contender]:
    """The Triton kernels of an operator of which the CUDA ones serve where they were built.

    ``call`` as of :func:`operator_case`.
    """
    if device_type != "cuda":
        return {}

    def run(*inputs):
        from diffad_fast import ops, use_backend

        with use_backend("triton"):
            return call(ops, *inputs)

    return {"diffad_fast, Triton": in_format(memory_format, run, graph=True)}


def in_format(memory_format: str, run: Callable, **options) -> Contender:
    """A contender whose 4-D inputs are in ``memory_format``."""
    layout = getattr(torch, "contiguous_format" if memory_format == "contiguous" else memory_format)

    def prepare(inputs: tuple) -> tuple:
        return map_tensors(
            lambda x: x.contiguous(memory_format=layout) if x.dim() == 4 else x, inputs
        )

    return Contender(run, prepare, memory_format=memory_format, **options)


def numpy_inputs(run: Callable, note: str = "", **options) -> Contender:
    """A contender that works on NumPy arrays."""
    return Contender(
        run,
        lambda inputs: map_tensors(lambda x: x.numpy(), inputs),
        cpu_only=True,
        note=note,
        **options,
    )


def map_tensors(function: Callable, value):
    """``value`` with ``function`` applied to the tensors in its tuples, lists and named tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def random(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal float32; drawn on the CPU, the same on every machine."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def on(device: torch.device, *values) -> tuple:
    return map_tensors(lambda x: x.to(device), values)


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x
