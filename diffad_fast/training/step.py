"""A training step as one CUDA graph."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from functools import cache

import torch

from ..diffusion.graphs import capturing

WARM_UP = 3  # steps, which libraries use to load kernels and choose among them


class CapturedStep:
    """``step(*inputs)``: host tensors of the same shapes each time in, a device tensor out.

    The first calls run eagerly, on a stream of their own as capture asks for; the next one
    is captured, and from there on a call copies its inputs to where the graph reads them and
    replays it: no Python between layers, no allocation, no synchronisation. Whatever else the step
    reads has to stay where it was. Where capture is impossible, as of a network that reads its own
    numbers, all calls run eagerly, after a warning.
    """

    def __init__(self, step: Callable, device: torch.device):
        self._step, self._device = step, device
        self._eager: float = WARM_UP  # calls to come
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = _stream(device, threading.get_ident())

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self._graph is None and self._eager == 0:
            self._capture(inputs)
        if self._graph is None:
            self._eager -= 1
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                result = self._step(*inputs)
            current.wait_stream(self._stream)
            return result
        for kept, new in zip(self._inputs, inputs, strict=True):
            # Pageable memory is staged before the call returns, pinned memory must not change
            # until the copy has been made: inputs are new tensors each time.
            kept.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._result

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Computes nothing: the step itself is the first replay."""
        self._inputs = [t.to(self._device) for t in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, self._stream):
                self._result = self._step(*self._inputs)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            warnings.warn(
                f"training runs without a CUDA graph, its capture failed: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
            self._eager = math.inf
        else:
            self._graph = graph


@cache
def _stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for all steps of a thread: for every stream that has seen a product, cuBLAS keeps memory.
    Another thread may be capturing on its own."""
    return torch.cuda.Stream(device)
