"""Work that is counted instead of timed, the same in every run: calls, kernels, bytes, waits."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

REGION = "benchmarks.count"


def count(run: Callable, device: torch.device) -> dict[str, int]:
    """Counts of one call.

    ``operators``: calls to PyTorch operators, ours included, from outside of another one.
    ``allocated_bytes``: sum of what PyTorch allocated on the device, freed again or not;
    ``peak_bytes``: the most that was held at a time above what was there before.
    ``numpy_peak_bytes``: the same of NumPy's arrays (and Python's objects). On a GPU also
    ``kernels``, launched copies included, and ``synchronisations``: how often the host waited for
    the device.
    """
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    profile = torch.profiler.profile(activities=activities, profile_memory=True)
    with _quiet():
        profile.start()
    tracemalloc.start()
    try:
        with torch.profiler.record_function(REGION):
            run()
        if cuda:
            torch.cuda.synchronize(device)
        numpy_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        with _quiet():
            profile.stop()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    region = next(event for event in events if event.name() == REGION)  # the host's comes first
    called, returned = region.start_ns(), region.start_ns() + region.duration_ns()
    result = {"operators": 0}
    if cuda:
        result |= {"kernels": 0, "synchronisations": 0}
    allocated = held = peak = 0
    ends: dict[int, int] = {}  # thread -> when its outermost operator returns
    for event in events:
        name = event.name()
        if name == "[memory]":
            if (event.device_type() == torch.autograd.DeviceType.CUDA) == cuda:
                held += event.nbytes()
                allocated += max(event.nbytes(), 0)
                peak = max(peak, held)
        elif cuda and event.device_type() == torch.autograd.DeviceType.CUDA:
            result["kernels"] += name != REGION
        elif cuda and "Synchronize" in name:
            result["synchronisations"] += called <= event.start_ns() < returned
        elif name.startswith(("aten::", "diffad_fast::")):
            # What an operator calls itself starts before it ends.
            thread, start = event.start_thread_id(), event.start_ns()
            if start >= ends.get(thread, 0):
                result["operators"] += 1
                ends[thread] = start + event.duration_ns()
    result |= {"allocated_bytes": allocated, "peak_bytes": peak}
    return {**result, "numpy_peak_bytes": numpy_peak}


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes to the file of standard error when it starts and stops."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
