"""Times of contenders, taken in rounds: each round runs all of them, so that what disturbs the
machine disturbs them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import torch

SHORTEST_MS = 0.2  # a sample below this would measure the clock
# A contender that takes SLOW times as long as the leader runs in every SELDOM-th round: how far it
# is behind is seen from few samples, and it would take most of the time.
SLOW, SELDOM = 4.0, 3
# With simulated noise the 95% bootstrap interval of a ratio of medians holds the true one in 72% of
# cases from 3 rounds, in 93% from 5 and in 95% from 7.
ENOUGH = 7


class HostClock:
    """perf_counter around one call, or around as many as make a sample long enough."""

    def __init__(self, device: torch.device):
        self.device = device
        self._repeats: dict[Callable, int] = {}

    def start(self, run: Callable) -> Callable[[], float]:
        """Time ``run``; the result gives the milliseconds of a call."""
        if run not in self._repeats:
            elapsed = self._calibrate(run)
            return lambda: elapsed
        repeats = self._repeats[run]
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        self._wait()
        elapsed = 1e3 * (time.perf_counter() - began) / repeats
        return lambda: elapsed

    def _calibrate(self, run: Callable) -> float:
        began = time.perf_counter()
        run()
        self._wait()
        elapsed = 1e3 * (time.perf_counter() - began)
        self._repeats[run] = max(1, min(1000, round(SHORTEST_MS / max(elapsed, 1e-6))))
        return elapsed

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class DeviceClock:
    """CUDA events around one call, after a write that has pushed everything out of the L2 cache.

    The write also keeps the device busy while the host gets the call under way, so that launch
    overhead is not counted as the kernel's time.
    """

    def __init__(self, device: torch.device):
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * size, 1 << 26), dtype=torch.int8, device=device)

    def start(self, run: Callable) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        run()
        end.record()

        def elapsed() -> float:
            end.synchronize()
            return begin.elapsed_time(end)

        return elapsed


def rounds(
    runs: Mapping[str, Callable],
    clock: HostClock | DeviceClock,
    seconds: float,
    at_least: int,
    at_most: int,
    leader: str | None = None,
    each: int = ENOUGH,
) -> dict[str, list[float]]:
    """Milliseconds of each contender in each of its rounds, in the order of the rounds.

    Goes on for ``seconds``, and for ``at_least`` rounds unless that takes ten times as long; until
    everybody has run in ``each`` rounds in any case, however long that takes: a case whose calls
    take seconds takes minutes. Never for more than ``at_most``. With a ``leader``, those who take
    SLOW times as long as it run in the first round and every SELDOM-th after it. Each round has an
    order of its own, drawn from a fixed seed, so that nobody always runs after the same neighbour
    and finds in the caches what that one left there.
    """
    names = list(runs)
    # The first samples fill caches.
    first_ms = {name: clock.start(runs[name])() for name in names}
    limit = SLOW * first_ms[leader] if leader in first_ms else float("inf")
    slow = {name for name in names if first_ms[name] > limit}
    fewest = SELDOM * (each - 1) + 1 if slow else each
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    began = time.perf_counter()
    for number in range(at_most):
        elapsed = time.perf_counter() - began
        needed = fewest if elapsed > 10 * seconds else max(fewest, at_least)
        if elapsed > seconds and number >= needed:
            break
        for name in order.sample(names, len(names)):
            if name not in slow or number % SELDOM == 0:
                times[name].append(clock.start(runs[name])())
    return times
