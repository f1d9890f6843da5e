"""Operators on this CPU against their baselines, each checked before it is timed."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import pywt
import torch

from diffad_fast import ops, reference

from .machine import describe, write

TOLERANCE = 1e-5  # of float32 against the float64 reference, relative to the largest value


def contenders(level: int) -> dict[str, Callable]:
    def by_pywavelets(x: torch.Tensor) -> torch.Tensor:
        bands = [x.numpy()]
        for _ in range(level):
            parts = [pywt.dwt2(band, "haar", mode="periodization") for band in bands]
            parts = [(low, *high) for low, high in parts]
            # The digit of the level just done, the coarsest so far, is the most significant.
            bands = [part[digit] for digit in range(4) for part in parts]
        return torch.cat([torch.from_numpy(band) for band in bands], dim=1)

    return {
        "diffad_fast": lambda x: ops.haar_pack(x, level),
        "reference": lambda x: reference.haar_pack(x, level),
        "PyWavelets": by_pywavelets,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="time a contender, at least")
    args = parser.parse_args(argv)
    rows, wrong = [], []
    for shape in ((16, 3, 256, 256), (64, 64, 64, 64), (1, 3, 2048, 2048), (1, 1, 64, 64)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        copied = _times(lambda x=x: x.clone(), args.seconds)
        for level in (1, 3):
            exact = reference.haar_pack(x.double(), level)
            row = {"operator": f"haar_pack level {level}", "shape": list(shape)}
            for name, run in contenders(level).items():
                error = float((run(x).double() - exact).abs().max() / exact.abs().max())
                if not error <= TOLERANCE:
                    wrong.append(f"{name}, {row['operator']}, {shape}: error {error:.1e}")
                    continue
                row[name] = _times(lambda x=x, run=run: run(x), args.seconds)
            row["copy"] = copied
            rows.append(row)
    result = {"machine": describe(), "rows": rows, "wrong": wrong}
    write("cpu", result, table(result))
    print("\n".join(f"WRONG, not timed: {line}" for line in wrong), file=sys.stderr)
    return 1 if wrong else 0


def table(result: dict) -> str:
    machine = result["machine"]
    lines = [
        "# Operators on the CPU",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"commit {machine['commit']}, {machine['date']}. float32, contiguous. Median milliseconds; "
        "in brackets the ratio to ours; share: of the speed of copying the tensor.",
        "",
        "| operator | shape | ours | share of copy | reference | PyWavelets |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        shape = "×".join(map(str, row["shape"]))
        if "diffad_fast" not in row:
            lines.append(f"| {row['operator']} | {shape} | wrong | | | |")
            continue
        ours = row["diffad_fast"]["p50"]
        cells = [f"{ours:.3f}", f"{row['copy']['p50'] / ours:.0%}"]
        for name in ("reference", "PyWavelets"):
            other = row.get(name)
            cells.append(f"{other['p50']:.3f} ({other['p50'] / ours:.1f}×)" if other else "wrong")
        lines.append(f"| {row['operator']} | {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _times(run: Callable, seconds: float) -> dict[str, float]:
    """Milliseconds at the 20th, 50th and 80th percentile, over at least ``seconds`` and 10 runs."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    quantiles = statistics.quantiles(times, n=5)
    return {"p20": quantiles[0], "p50": statistics.median(times), "p80": quantiles[3]}
