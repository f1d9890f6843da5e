"""Counted work: a guard without a clock."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import counting
from benchmarks.case import random
from benchmarks.timing import DeviceClock
from diffad_fast import ops
from diffad_fast.ops import dispatch

CPU = torch.device("cpu")


def counts(function, *args, **options) -> dict[str, int]:
    with torch.inference_mode():
        function(*args, **options)  # filters and the like are made once
        return counting.count(lambda: function(*args, **options), CPU)


X = random(4, 16, 32, 32)
SIZE = X.nbytes


@pytest.mark.native
@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_native_haar_is_one_call_that_allocates_its_result_alone(level, memory_format):
    x = X.to(memory_format=memory_format)
    for found in (
        counts(ops.haar_pack, x, level),
        counts(ops.haar_unpack, ops.haar_pack(x, level), level),
    ):
        assert found["operators"] == 1
        assert found["allocated_bytes"] == found["peak_bytes"] == SIZE


# Operators called from Python, and the sum of all allocations as a multiple of the first input:
# what the plain reference needs; a tenth more is allowed. A native version needs less.
LIMITS = {
    "group_norm_silu": (ops.group_norm_silu, (X, 4), 2, 2.0),
    "q_sample": (ops.q_sample, (X, torch.arange(4), X, torch.rand(10)), 16, 3.0),
    "ddim_step": (ops.ddim_step, (X, X, 0.5, 0.6), 28, 6.0),
    "dwt2d": (ops.dwt2d, (X, "db4", "symmetric"), 29, 26.4),
    "idwt2d": (ops.idwt2d, ((X, X, X, X), "db4", "symmetric"), 16, 25.7),
    "wavelet_attention": (ops.wavelet_attention, (X.reshape(2, 2, 32, 32, 16),) * 3, 132, 42.0),
    "anomaly_map": (ops.anomaly_map, (X, -X, (), (), (1.0, 1.0, 1.0), 2), 109, 12.4),
    "philox_normal": (ops.philox_normal, (tuple(X.shape), 7, 0, 0, CPU), 146, 71.5),
}


@pytest.mark.parametrize("operator", LIMITS)
def test_counted_work_of_operators(operator):
    function, inputs, calls, passes = LIMITS[operator]
    found, again = (counts(function, *inputs) for _ in range(2))
    for key in ("operators", "allocated_bytes", "peak_bytes"):
        assert found[key] == again[key]
    assert 0 < found["operators"] <= 1.1 * calls
    assert found["allocated_bytes"] <= 1.1 * passes * SIZE


def test_a_count_sees_what_is_there():
    found = counts(lambda: (X + 1) * 2)
    assert found["operators"] == 2
    assert found["allocated_bytes"] == pytest.approx(2 * SIZE, abs=100)  # and the two scalars
    assert found["peak_bytes"] == pytest.approx(2 * SIZE, abs=100)
    found = counts(lambda: [(X + 1).sum() for _ in range(3)])
    assert found["allocated_bytes"] == pytest.approx(3 * SIZE, rel=0.01)
    assert found["peak_bytes"] == pytest.approx(SIZE, rel=0.01)
    found = counts(lambda: np.ones(1 << 20))
    assert found["numpy_peak_bytes"] == pytest.approx(8 << 20, rel=0.01)


@pytest.mark.gpu
def test_counted_work_and_times_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda")
    x = X.to(device)
    ops.haar_pack(x, 3)
    found = counting.count(lambda: ops.haar_pack(x, 3), device)
    assert found["synchronisations"] == 0
    assert found["kernels"] >= 1 and found["peak_bytes"] >= SIZE
    if dispatch.OPERATORS["haar_pack"].backend("cuda") == "cuda":
        assert found["kernels"] == 1 and found["allocated_bytes"] == SIZE
    clock = DeviceClock(device)
    x.add_(1)  # the first call loads the kernel
    small, large = torch.ones(1 << 10, device=device), torch.ones(1 << 28, device=device)
    times = [clock.start(lambda y=y: y.add_(1))() for y in (small, large)]
    # 2 GiB are moved: at most 10 TB/s, so at least 0.2 ms, where 8 KiB take microseconds.
    assert times[0] < 0.2 < times[1]
