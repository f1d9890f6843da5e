"""Runs cases: the exact result, the check of every contender, then times and counts of the right
ones."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from diffad_fast.diffusion.graphs import capturing

from . import ceilings, counting, machine, stats
from .case import OURS, REFERENCE, Case, Contender, map_tensors
from .timing import ENOUGH, SELDOM, DeviceClock, HostClock, rounds
from .verify import wrong

ROTATED_COPIES = 32  # at most; inputs that then still fit into the caches are small ones by nature


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    """For the rounds of one case, which take longer where ``each`` asks for it."""
    at_least: int
    """Rounds."""
    at_most: int = 100
    each: int = ENOUGH
    """Rounds of every contender, however long they take."""
    compile_seconds: float = float("inf")
    """After so much time in torch.compile the remaining compiled baselines are left out."""


FULL = Effort(2.0, 15)
QUICK = Effort(0.7, 7, each=3, compile_seconds=0.0)
QUICK_GPU = Effort(0.3, 15, each=3, compile_seconds=60.0)


def _as_a_program_has_them() -> torch.inference_mode:
    """For inputs: tensors that are made in inference mode have no versions, by which weights are
    known that were packed before."""
    return torch.inference_mode(False)


@dataclass
class Run:
    """Cases on one device; ``rows`` and ``wrong`` are filled by :meth:`measure`."""

    device: torch.device
    effort: Effort
    quick: bool
    rows: list[dict] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    compiled_seconds: float = 0.0

    def measure(self, cases: Iterable[Case]) -> None:
        """Measure the cases, each made when its turn comes.

        float32 is float32: without TF32, which convolutions would use on a GPU. An interrupt
        (Ctrl-C) ends the measuring, and what was measured is kept.
        """
        torch.backends.cudnn.allow_tf32 = False
        before = ceilings.measure(self.device, self.quick)
        measured = []
        try:
            for case in cases:
                print(f"  {case.key}", file=sys.stderr, flush=True)
                row = self._row(case)
                print(f"    {_in_short(row)}", file=sys.stderr, flush=True)
                measured.append((case, row))
        except KeyboardInterrupt:
            self.wrong.append(f"interrupted: only the first {len(measured)} cases are measured")
        self.ceilings = ceilings.higher(before, ceilings.measure(self.device, self.quick))
        for case, row in measured:
            if bounded := ceilings.bound(case, self.ceilings):
                row["bound"], row["bound_ms"] = bounded
            self.rows.append(row)

    def result(self, suite: str) -> dict:
        """What is written as JSON."""
        return {
            "format": 1,
            "suite": suite,
            "quick": self.quick,
            "device": self.device.type,
            "machine": machine.describe(self.device),
            "ceilings": self.ceilings,
            "rows": self.rows,
            "wrong": self.wrong,
        }

    def _row(self, case: Case) -> dict:
        with torch.inference_mode(not case.gradients):
            return self._measured(case)

    def _measured(self, case: Case) -> dict:
        with _as_a_program_has_them():
            inputs = case.inputs(self.device)
        exact = case.exact(inputs)
        served_by = case.served_by(self.device.type) if case.served_by else None
        found: dict[str, dict] = {}
        runs: dict[str, Callable] = {}
        for name, contender in case.contenders.items():
            entry = {"settings": contender.settings(self.device)}
            found[name] = entry
            if served_by == "reference" and _same_code(case, name):
                entry["left_out"] = f"the same code as {OURS}"
            elif contender.cpu_only and self.device.type != "cpu":
                entry["left_out"] = "runs on the CPU only"
            elif contender.compiled and self.compiled_seconds >= self.effort.compile_seconds:
                entry["left_out"] = "torch.compile takes too long for --quick"
            else:
                run = self._checked(case, name, contender, inputs, exact, entry)
                if run:
                    runs[name] = run
        clock = HostClock if case.host or self.device.type == "cpu" else DeviceClock
        effort = self.effort
        samples = {}
        if runs:
            bounds = effort.at_least, effort.at_most
            if case.rounds and not self.quick:
                bounds = case.rounds, case.rounds
            samples = rounds(runs, clock(self.device), effort.seconds, *bounds, OURS, effort.each)
        for name, run in runs.items():
            part = case.contenders[name].part
            samples[name] = [value / part for value in samples[name]]
            found[name]["ms"] = [float(f"{value:.4g}") for value in samples[name]]
            found[name] |= stats.quantiles(samples[name])
            found[name]["per_second"] = 1e3 * case.batch / found[name]["p50"]
            found[name]["counts"] = counting.count(run, self.device)
            if OURS in runs and name != OURS:
                ours = samples[OURS]
                if len(samples[name]) < len(ours):
                    ours = ours[::SELDOM]  # those of the same rounds
                ratio, low, high = stats.ratio(samples[name], ours, paired=True)
                verdict = stats.verdict(low, high)
                found[name]["ratio"] = {
                    "value": ratio, "low": low, "high": high, "ours_is": verdict,
                }  # fmt: skip
        torch._dynamo.reset()
        return {
            "case": case.key,
            "operator": case.operator,
            "name": case.name,
            "batch": case.batch,
            "unit": case.unit,
            "bytes": case.bytes,
            "flops": case.flops,
            "parameters": case.parameters,
            "sweep": dict(case.sweep),
            "served_by": served_by,
            "clock": "device" if clock is DeviceClock else "host",
            "in_cache": self._copies(inputs) * _size(inputs) < self._cache(),
            "contenders": found,
        }

    def _checked(
        self, case: Case, name: str, contender: Contender, inputs: tuple, exact, entry: dict
    ) -> Callable | None:
        """A function that runs the contender on one copy of its inputs after the other; None, with
        the reason noted, if it fails or its result is wrong."""
        run = contender.run
        if contender.compiled:
            run = torch.compile(run, dynamic=False)
        if contender.graph and self.device.type == "cuda":
            run = _captured(run)
        began = time.perf_counter()
        try:
            with _as_a_program_has_them():
                prepared = contender.prepare(inputs)
            began = time.perf_counter()
            output = run(*prepared)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            entry["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if name == OURS:
                self.wrong.append(f"{case.key}: {name} failed: {entry['failed']}")
            return None
        finally:
            entry["first_call_ms"] = 1e3 * (time.perf_counter() - began)
            self.compiled_seconds += contender.compiled * entry["first_call_ms"] / 1e3
        if reason := wrong(case, contender, exact, output):
            entry["wrong"] = reason
            self.wrong.append(f"{case.key}: {name}: {reason}")
            return None
        if self.device.type == "cuda":
            run(*prepared)  # a detector captures what comes a second time
        copies = [prepared]
        with _as_a_program_has_them():
            for _ in range(self._copies(inputs) - 1):
                copies.append(contender.prepare(map_tensors(torch.clone, inputs)))
        for copy in copies[1:]:
            run(*copy)  # what is made of weights once is there
        turn = itertools.cycle(copies)
        return lambda: run(*next(turn))

    def _copies(self, inputs: tuple) -> int:
        """So many that a copy has left the caches when its turn comes again."""
        if self.device.type == "cuda":
            return 1  # the clock empties the cache
        wanted = -(-2 * self._cache() // max(_size(inputs), 1))
        return min(max(wanted, 1), ROTATED_COPIES)

    def _cache(self) -> int:
        return 0 if self.device.type == "cuda" else machine.cache_bytes()


def _in_short(row: dict) -> str:
    """A line on a measured case, for whoever waits."""
    parts = []
    for name, entry in row["contenders"].items():
        if "p50" not in entry:
            parts.append(f"{name}: {entry.get('wrong') or entry.get('failed') or 'left out'}")
        elif name == OURS or "ratio" not in entry:
            parts.append(f"{name} {entry['p50']:.4g} ms")
        else:
            parts.append(f"{name} {entry['ratio']['value']:.3g} times ours")
    return "; ".join(parts)


def _captured(run: Callable) -> Callable:
    """``run`` as a CUDA graph of its first call. Further calls must have the same arguments, and
    have: on a GPU there is one copy of the inputs."""
    replays: list = []

    def call(*inputs):
        if not replays:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                run(*inputs)  # compiles and loads what a capture must not
            with capturing(graph, stream):
                output = run(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            replays.append((graph, output))
        graph, output = replays[0]
        graph.replay()
        return output

    return call


def _size(inputs: tuple) -> int:
    total = [0]

    def add(x: torch.Tensor) -> None:
        total[0] += x.nbytes

    map_tensors(add, inputs)
    return total[0]


def _same_code(case: Case, name: str) -> bool:
    """Does this contender run the plain reference on inputs of the same form as ours?"""
    ours, other = case.contenders[OURS], case.contenders[name]
    plain = name.startswith(REFERENCE) and not other.compiled
    return plain and other.memory_format == ours.memory_format
