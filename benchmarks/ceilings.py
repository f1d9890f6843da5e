"""What work is compared with, measured in the same run: a copy, and torch's products of matrices.

Neither is a hard ceiling: reading alone is faster than a copy, and so can other products be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .case import Case, random
from .machine import tf32
from .timing import HostClock, rounds


def measure(device: torch.device, quick: bool) -> dict:
    """``copy_gb_per_s`` (bytes read plus bytes written) and ``matrix_gflop_per_s`` by number type.

    ``clone_gb_per_s`` is that of a copy into new memory, which is where an operator's result goes.

    Each from the shortest of its times: what an undisturbed machine does.
    """
    cuda = device.type == "cuda"
    megabytes = 2048 if cuda else (64 if quick else 256)
    x = torch.empty(megabytes << 18, dtype=torch.float32, device=device).fill_(1)
    y = torch.empty_like(x)
    side = 8192 if cuda else (1024 if quick else 1536)
    runs: dict[str, Callable] = {"copy": lambda: y.copy_(x), "clone": x.clone}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = random(side, side).to(device, dtype)
        runs[name] = lambda a=a: a @ a
    if cuda:
        a32 = random(side, side).to(device)

        def with_tf32():
            with tf32(torch.backends.cuda.matmul):
                return a32 @ a32

        runs["tf32"] = with_tf32
    times = rounds(runs, HostClock(device), 2.0 if quick else 5.0, 7, 50)
    ms = {name: min(samples) for name, samples in times.items()}
    copy_ms, clone_ms = ms.pop("copy"), ms.pop("clone")
    return {
        "copy_gb_per_s": 2 * x.nbytes / copy_ms / 1e6,
        "clone_gb_per_s": 2 * x.nbytes / clone_ms / 1e6,
        "copy_megabytes": megabytes,
        "matrix_gflop_per_s": {name: 2 * side**3 / value / 1e6 for name, value in ms.items()},
        "matrix_side": side,
    }


def higher(a: dict, b: dict) -> dict:
    """The higher of two measurements of each ceiling: the less disturbed one."""
    rates = {
        name: max(rate, b["matrix_gflop_per_s"][name])
        for name, rate in a["matrix_gflop_per_s"].items()
    }
    memory = {name: max(a[name], b[name]) for name in ("copy_gb_per_s", "clone_gb_per_s")}
    return {**a, **memory, "matrix_gflop_per_s": rates}


def bound(case: Case, ceilings: dict) -> tuple[str, float] | None:
    """What bounds a case, "memory" or "matrix", and the milliseconds that this alone takes."""
    memory = case.bytes / ceilings["copy_gb_per_s"] / 1e6
    matrix = case.flops / ceilings["matrix_gflop_per_s"][case.rate] / 1e6 if case.rate else 0.0
    if memory == matrix == 0:
        return None
    return ("memory", memory) if memory >= matrix else ("matrix", matrix)
