"""A function of one tensor as one CUDA graph a shape."""

from __future__ import annotations

import statistics
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .. import ops

# One capture at a time in a process: its beginning synchronises the device, which another one that
# is under way does not survive. A signal's handler may begin one while its thread prepares another.
CAPTURING = threading.RLock()

# Does PyTorch keep the memory of a capture that failed? To give it back twice would be an error in
# each later call that frees memory; AMD's builds of old versions give it back themselves.
KEEPS_FAILED = torch.__version__ < "2.13.1" and torch.version.hip is None

# Calls by which a graph has to be used again, or it makes room for another: a capture takes as long
# as some nine of them.
RECENT = 64
# Shapes without a graph of which something is remembered.
REMEMBERED = 64


class Graphed:
    """``function(x)``, in inference mode; on a CUDA device by one launch.

    There a shape that comes a second time is captured as one CUDA graph, which then replays: no
    Python, no synchronisation, no allocation but of the results, which are copies, as the next
    replay writes over the graph's own. At most ``graphs`` of them are kept, one for each
    shape, dtype and layout; a further one waits until one of them has not been used for a while.
    All are forgotten when a tensor of ``modules`` changes; these modules' parts, and whatever the
    function reads beside them, have to stay the same. Where capture is impossible the function runs
    eagerly, after a warning that says why; where a trial shows no gain, too, and always on a CPU.
    Results are tensors in tuples, lists or dicts. Threads may share it, each on a stream of its
    own: they take turns, as a graph has one set of buffers and the function may make constants. A
    signal's handler that calls it in the midst of its thread's own call has the function run
    eagerly.
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
        self._begin()

    def _begin(self) -> None:
        self._turn = threading.RLock()
        self._under_way = False
        self._done: torch.cuda.Event | None = None  # of the last call, whatever its stream
        self._calls = 0
        # The one longest unused first, each with the call that it was used by.
        self._captured: OrderedDict[Hashable, tuple[CapturedCall, int]] = OrderedDict()
        # The last, smaller batch of a data set is not worth a capture: shapes that have come once,
        # and whether they are worth one should they come again.
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()
        self._read: list[int] = []

    def forget(self) -> None:
        """Give back the memory of all graphs, unless a call is under way. It is not left to the end
        of this object: that waits for Python's collector of cycles, which knows nothing of a GPU's
        memory."""
        # Without waiting: the collector may call this in the midst of a call.
        if self._turn.acquire(blocking=False):
            try:
                if not self._under_way:
                    self._captured.clear()
                    self._seen.clear()
            finally:
                self._turn.release()

    def __getstate__(self) -> dict:
        """Copies, in another process too, capture graphs of their own."""
        return {k: vars(self)[k] for k in ("function", "graphs", "_places")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._begin()

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor):
        # A part of it in a capture of the caller's, where there is no waiting for other calls.
        if not (x.is_cuda and self.graphs) or torch.cuda.is_current_stream_capturing():
            return self.function(x)
        with self._turn:
            if self._under_way:  # in this thread, by a signal's handler: the buffers are in use
                return self.function(x)
            self._under_way = True
            try:
                return self._in_turn(x)
            finally:
                self._under_way = False

    def _in_turn(self, x: torch.Tensor):
        """A call while no other one is under way."""
        stream = torch.cuda.current_stream(x.device)
        if self._done is None:
            self._done = torch.cuda.Event()
        stream.wait_event(self._done)  # nothing before the first call
        try:
            captured = self._graph(x)
            return self.function(x) if captured is None else captured(x)
        finally:
            self._done.record(stream)

    def _graph(self, x: torch.Tensor) -> CapturedCall | None:
        """The captured call for tensors like x; None where it runs eagerly."""
        read = [*self._versions()]
        if read != self._read:
            self._captured.clear()
            self._seen.clear()
            self._read = read
        key = x.shape, x.dtype, x.device, x.stride(), ops.dispatch.selected()
        self._calls += 1
        captured, _ = self._captured.get(key, (None, 0))
        if captured is None:
            captured = self._new(key, x)
        if captured is not None:
            self._captured[key] = captured, self._calls
            self._captured.move_to_end(key)
        return captured

    def _new(self, key: Hashable, x: torch.Tensor) -> CapturedCall | None:
        """A graph for a shape that has none, if it has come before and there is room."""
        worth_it = self._seen.pop(key, None)
        self._seen[key] = worth_it is not False
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        if not worth_it:
            return None
        if len(self._captured) >= self.graphs:
            oldest, (_, used) = next(iter(self._captured.items()))
            if self._calls - used <= RECENT:
                return None
            del self._captured[oldest]
        captured = self._capture_or_warn(x)
        self._seen[key] = captured is not None
        return captured

    def _capture_or_warn(self, x: torch.Tensor) -> CapturedCall | None:
        try:
            captured = CapturedCall(self.function, x)
        except Exception as error:
            warnings.warn(
                f"scoring runs without a CUDA graph, its capture failed: {error}",
                RuntimeWarning,
                stacklevel=7,
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
            try:
                with torch.cuda.stream(side):
                    for _ in range(2):  # libraries load their kernels and choose among them
                        function(self._input)
                    self._graph = torch.cuda.CUDAGraph()
                    with capturing(self._graph, side):
                        self._output = function(self._input)
            finally:
                current.wait_stream(side)  # before the memory of what failed is given away

    def __call__(self, x: torch.Tensor):
        # Its memory is another stream's, which may be given it anew when this call is forgotten.
        self._input.record_stream(torch.cuda.current_stream(x.device))
        self._input.copy_(x)
        self._graph.replay()
        return tree_map(lambda y: y.clone() if isinstance(y, torch.Tensor) else y, self._output)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: for every stream that has seen a product, cuBLAS keeps memory."""
    return torch.cuda.Stream(device)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Captures the block on ``stream`` into ``graph``; other threads may use the device meanwhile.
    An error of the block or of the capture leaves PyTorch as it was before."""
    pool = torch.cuda.graph_pool_handle()
    mode = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
    try:
        # A capture that fails leaves its stream the current one: the outer block does not.
        with CAPTURING, torch.cuda.stream(stream), torch.cuda.graph(graph, **mode):
            yield
    except BaseException:  # an interruption, too
        _recover(graph, pool, stream.device)
        raise


def _recover(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device) -> None:
    """After a capture that failed, do what PyTorch does not: until 2.13 it takes the capture to go
    on, gives no cached memory back and, by its headers, draws no random numbers until another one
    has ended; 2.13.0 still keeps the capture's memory."""
    with CAPTURING, torch.cuda.device(device):
        index = torch.cuda.current_device()
        with suppress(Exception):  # if it has ended
            torch._C._cuda_endAllocateToPool(index, pool)
        if KEEPS_FAILED and not _ended(graph):
            with suppress(Exception):  # if it never began
                torch._C._cuda_releasePool(index, pool)
        with suppress(Exception):
            side, another = _side_stream(device), torch.cuda.CUDAGraph()
            mode = {"stream": side, "capture_error_mode": "thread_local"}
            with torch.cuda.stream(side), torch.cuda.graph(another, **mode):
                torch.zeros(1, device=device)


def _ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Was it captured, and only what came then failed? Such a graph gives back its own memory."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def elapsed(call: Callable, x: torch.Tensor) -> float:
    """Milliseconds of ``call(x)`` on the device."""
    with torch.cuda.device(x.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(x)
        end.record()
        end.synchronize()
    return start.elapsed_time(end)
