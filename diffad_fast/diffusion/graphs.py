"""A function of one tensor as one CUDA graph a shape."""

from __future__ import annotations

import statistics
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import cache

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .. import ops

# One capture at a time in a process: its beginning synchronises the device, which another one that
# is under way does not survive.
CAPTURING = threading.Lock()

# A call that has not come before, and one that has come once: the last, smaller batch of a data set
# is not worth a capture.
NEW, ONCE = "new", "once"


class Graphed:
    """``function(x)``, in inference mode; on a CUDA device by one launch.

    There a shape that comes a second time is captured as one CUDA graph, which then replays: no
    Python, no synchronisation, no allocation. The last ``graphs`` of them are kept, one for each
    shape, dtype, layout and version of the tensors of ``modules``: these modules' parts, and
    whatever the function reads beside them, have to stay the same. Where capture is impossible the
    function runs eagerly, after a warning that says why; where a trial shows no gain, too, and
    always on a CPU. Results are tensors in tuples, lists or dicts. Threads may share it: they take
    turns, as a graph has one set of buffers.
    """

    def __init__(self, function: Callable, modules: Iterable[nn.Module], graphs: int = 4):
        self.function, self.graphs = function, graphs
        # Where the tensors stand; finding these places takes longer than a small graph.
        self._places = [
            place
            for module in modules
            for part in module.modules()
            for place in (part._parameters, part._buffers)
        ]
        self._forget()

    def _forget(self) -> None:
        self._captured: OrderedDict[Hashable, CapturedCall | str | None] = OrderedDict()
        self._turn = threading.Lock()

    def __getstate__(self) -> dict:
        """Copies, in another process too, capture graphs of their own."""
        return {k: v for k, v in vars(self).items() if k not in ("_captured", "_turn")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._forget()

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor):
        if not (x.is_cuda and self.graphs):
            return self.function(x)
        with self._turn:
            captured = self._graph(x)
            return self.function(x) if captured is None else captured(x)

    def _graph(self, x: torch.Tensor) -> CapturedCall | None:
        """The captured call for tensors like x; None where it runs eagerly."""
        key = (x.shape, x.dtype, x.device, x.stride(), ops.dispatch.selected(), *self._versions())
        captured = self._captured.get(key, NEW)
        if captured is NEW:
            captured = ONCE
        elif captured is ONCE:
            captured = self._capture_or_warn(x)
        self._captured[key] = captured
        self._captured.move_to_end(key)
        while len(self._captured) > self.graphs:
            self._captured.popitem(last=False)
        return captured if isinstance(captured, CapturedCall) else None

    def _capture_or_warn(self, x: torch.Tensor) -> CapturedCall | None:
        try:
            captured = CapturedCall(self.function, x)
        except Exception as error:
            _recover(x.device)
            warnings.warn(
                f"scoring runs without a CUDA graph, its capture failed: {error}",
                RuntimeWarning,
                stacklevel=4,
            )
            return None
        return captured if self._gains(captured, x) else None

    def _gains(self, captured: CapturedCall, x: torch.Tensor) -> bool:
        """Is the graph faster than the function itself? Both give the same bits."""
        times = {captured: [], self.function: []}
        for _ in range(3):
            for call, found in times.items():
                found.append(elapsed(call, x))
        return statistics.median(times[captured]) < statistics.median(times[self.function])

    def _versions(self) -> Iterable[int]:
        """What changes when a weight is replaced or updated in place."""
        tensors = [t for place in self._places for t in place.values() if t is not None]
        yield from [t.data_ptr() for t in tensors]
        yield from [0 if t.is_inference() else t._version for t in tensors]


class CapturedCall:
    """``function(x)`` for tensors like x, captured as a CUDA graph with buffers of its own."""

    def __init__(self, function: Callable, x: torch.Tensor):
        self._input = x.clone()
        current, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
        with CAPTURING, torch.cuda.device(x.device):
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries load their kernels and choose among them
                    function(self._input)
                self._graph = torch.cuda.CUDAGraph()
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                    self._output = function(self._input)
            current.wait_stream(side)
        self._done = torch.cuda.Event()
        self._done.record(current)

    def __call__(self, x: torch.Tensor):
        stream = torch.cuda.current_stream(x.device)
        # Another stream may still be in the last replay, whose buffers these are.
        stream.wait_event(self._done)
        self._input.copy_(x)
        self._graph.replay()
        result = tree_map(lambda y: y.clone() if isinstance(y, torch.Tensor) else y, self._output)
        self._done.record(stream)
        return result


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: for every stream that has seen a product, cuBLAS keeps memory."""
    return torch.cuda.Stream(device)


def _recover(device: torch.device) -> None:
    """After a capture that failed: by its headers PyTorch 2.11 leaves its generator of random
    numbers marked as under capture, where it refuses to draw, until another one has ended."""
    with suppress(Exception), CAPTURING, torch.cuda.device(device):
        side = _side_stream(device)
        with torch.cuda.stream(side), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
            torch.zeros(1, device=device)


def elapsed(call: Callable, x: torch.Tensor) -> float:
    """Milliseconds of ``call(x)`` on the device."""
    with torch.cuda.device(x.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(x)
        end.record()
        end.synchronize()
    return start.elapsed_time(end)
