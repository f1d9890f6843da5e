"""`python -m benchmarks compare A.json B.json`: what got faster or slower, beyond noise.

Exit status 1 if something of ours got slower or has no time any more, 2 without two results.
"""

from __future__ import annotations

import argparse
import statistics

from . import arguments, stats
from .case import OURS
from .grid import grid, number
from .tables import why

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
    """Markdown, and the cases in which something of ours got slower, or has no time any more.

    Two runs differ by more than their samples tell (clocks, neighbours, memory layout); the
    baselines, whose code stays the same, show by how much: every ratio is divided by their median.
    A change counts if the bootstrap interval of what is left lies outside 1 ± the margin.
    """
    old = {(row["case"], name): e for row, name, e in _entries(before)}
    changes, drift = [], []
    for row, name, entry in _entries(after):
        key = (row["case"], name)
        if key in old:
            ratio = stats.ratio(old[key]["ms"], entry["ms"], paired=False)
            changes.append((row, name, old[key], entry, ratio))
            if not name.startswith(OURS):
                drift.append(ratio[0])
    shift = statistics.median(drift) if drift else 1.0
    table, slower = [], []
    for row, name, was, now, ratio in changes:
        value, low, high = (one / shift for one in ratio)
        verdict = stats.verdict(low, high, margin)
        if verdict == "even":
            continue
        if verdict == "slower" and name.startswith(OURS):
            slower.append(row["case"])
        table.append(
            [
                row["case"],
                name,
                number(was["p50"]),
                number(now["p50"]),
                f"{number(value)}× ({number(low)}–{number(high)})",
                verdict,
            ]
        )
    gone = _gone(old, after)
    slower += [case for case, _, _ in gone]
    lines = [
        f"{before['machine']['commit']} ({before['machine']['date']}) → "
        f"{after['machine']['commit']} ({after['machine']['date']}): {len(changes)} times "
        f"compared, {len(table)} changed by more than {margin:.0%}"
        + (f" beside the baselines, which drifted by {shift:.2f}×." if drift
           else ". No baseline shows a drift.")
    ]  # fmt: skip
    for what in ("gpu", "cpu", "cpu_features", "cores", "threads", "torch"):
        a, b = ({**result["machine"], **result["machine"]["versions"]}[what]
                for result in (before, after))  # fmt: skip
        if a != b:
            lines.append(f"WARNING: {what} differs ({a}, {b}): times do not compare.")
    lines += [f"NO TIME any more: {case}, {name}: {why}." for case, name, why in gone]
    if table:
        head = ["case", "contender", "before ms", "after ms", "before / after, less drift", "got"]
        lines += ["", *grid(head, table)]
    return "\n".join(lines), list(dict.fromkeys(slower))


def _gone(old: dict, after: dict) -> list[tuple[str, str, str]]:
    """What of ours had a time and has none, in cases that were run: case, name and why."""
    return [
        (row["case"], name, why(row["contenders"][name]) if name in row["contenders"] else "gone")
        for row in after["rows"]
        for case, name in old
        if case == row["case"] and name.startswith(OURS)
        and "ms" not in row["contenders"].get(name, {})
    ]  # fmt: skip


def _entries(result: dict):
    for row in result["rows"]:
        for name, entry in row["contenders"].items():
            if "ms" in entry:
                yield row, name, entry
