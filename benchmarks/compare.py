"""`python -m benchmarks compare A.json B.json`: what got faster or slower, beyond noise.

Exit status 1 if something of ours got slower, 2 without two results.
"""

from __future__ import annotations

import argparse
import math

from . import arguments, stats
from .case import OURS
from .grid import grid, number

MARGIN = 0.05


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("before", type=arguments.result)
    parser.add_argument("after", type=arguments.result)
    parser.add_argument(
        "--margin", type=float, default=MARGIN, help="smaller changes are noise (%(default)s)"
    )
    args = parser.parse_args(argv)
    text, slower = report(args.before, args.after, args.margin)
    print(text)
    return 1 if slower else 0


def report(before: dict, after: dict, margin: float = MARGIN) -> tuple[str, list[str]]:
    """Markdown, and the cases in which something of ours got slower.

    A change counts if the bootstrap interval of the ratio of medians lies outside 1 ± the margin.
    Two runs differ by more than their samples tell (clocks, neighbours, memory layout); the
    baselines, whose code stays the same, show by how much, and the margin grows by that drift.
    """
    old = {(row["case"], name): e for row, name, e in _entries(before)}
    changes, drift = [], []
    for row, name, entry in _entries(after):
        key = (row["case"], name)
        if key in old:
            ratio = stats.ratio(old[key]["ms"], entry["ms"], paired=False)
            changes.append((row, name, old[key], entry, ratio))
            if not name.startswith(OURS):
                drift.append(math.log(ratio[0]))
    shift = math.exp(sum(drift) / len(drift)) if drift else 1.0
    margin = (1 + margin) * math.exp(abs(math.log(shift))) - 1
    table, slower = [], []
    for row, name, was, now, (ratio, low, high) in changes:
        verdict = stats.verdict(low, high, margin)
        if verdict == "even":
            continue
        if verdict == "slower" and name.startswith(OURS) and row["case"] not in slower:
            slower.append(row["case"])
        table.append(
            [
                row["case"],
                name,
                number(was["p50"]),
                number(now["p50"]),
                f"{number(ratio)}× ({number(low)}–{number(high)})",
                verdict,
            ]
        )
    lines = [
        f"{before['machine']['commit']} ({before['machine']['date']}) → "
        f"{after['machine']['commit']} ({after['machine']['date']}): {len(changes)} times "
        f"compared, {len(table)} changed by more than {margin:.0%}. "
        + (f"Baselines drifted by {shift:.2f}×." if drift else "No baseline shows a drift.")
    ]
    for what in ("gpu", "cpu", "cores", "threads"):
        a, b = before["machine"][what], after["machine"][what]
        if a != b:
            lines.append(f"WARNING: {what} differs ({a}, {b}): times do not compare.")
    if table:
        head = ["case", "contender", "before ms", "after ms", "before / after", "got"]
        lines += ["", *grid(head, table)]
    return "\n".join(lines), slower


def _entries(result: dict):
    for row in result["rows"]:
        for name, entry in row["contenders"].items():
            if "ms" in entry:
                yield row, name, entry
