"""`python -m benchmarks readme`: the newest results, all of them as the page of their folder and
in short in README.md, between two markers."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from . import results, tables
from .case import OURS
from .grid import grid, number
from .quality import audio
from .quality import tables as quality

README = Path(__file__).resolve().parents[1] / "README.md"
PAGE = results.RESULTS / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
TITLES = {
    "cpu": "Operators on a CPU",
    "gpu": "Operators on a GPU",
    "train": "Training",
    "metrics": "Metrics",
    "plugins": "Calls through other libraries",
    "end-to-end": "Quality against latency",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.parse_args(argv)
    README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{README} and {PAGE} have the newest results")
    return 0


def replaced(text: str, folder: Path = results.RESULTS) -> str:
    """``text`` with what is between the markers drawn anew. Raises ValueError without markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must have the lines {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{headlines(folder)}\n{END}{tail}"


def headlines(folder: Path = results.RESULTS) -> str:
    """The newest results in short: the main case of each operator and every case lost; and our
    detectors beside the best of what was run on the same data."""
    found = results.newest(folder)
    parts = []
    for suite in ("cpu", "gpu"):
        for place, (_, result) in enumerate(found.get(suite, [])):
            parts += [_in_short(result)] if place else _speed(suite, result)
    rows = []
    for path in sorted(folder.glob("*.json")):
        result = results.read(path)
        rows += [*quality.headlines(result), *audio.headlines(result)]
    if rows:
        head = ["data", "diffad_fast", "the best of what was run beside it"]
        parts += [
            "**Detection**, in percent: mean and standard deviation over the seeds, the 95% "
            "bootstrap interval over objects or recordings in brackets.",
            "\n".join(grid(head, rows)),
        ]
    if not parts:
        return "No results yet: `python -m benchmarks cpu` writes the first ones."
    page_of = "benchmarks/results/README.md" if folder == results.RESULTS else "README.md"
    return "\n\n".join([*parts, f"All results: [{page_of}]({page_of})."])


def _speed(suite: str, result: dict) -> list[str]:
    rows = []
    for row in _shown(result):
        others = row["contenders"]
        peers = {
            name: entry for name, entry in others.items()
            if not name.startswith(OURS) and name not in tables.BASELINES and "ratio" in entry
        }  # fmt: skip
        best = min(peers, key=lambda name: peers[name]["ratio"]["value"], default=None)
        rows.append(
            [
                row["case"],
                *(tables.ratio_in_short(others.get(name, {})) for name in tables.BASELINES),
                f"{tables.ratio_in_short(peers[best])} {best}" if best else "",
            ]
        )
    head = ["case", *tables.BASELINES.values(), "fastest peer"]
    quick = ", a quick run" if result["quick"] else ""
    alone = f" {tables.ALONE}" if suite == "cpu" else ""
    text = (
        f"**{TITLES[suite]}**{quick}: time of the other / time of ours, in float32 unless a "
        "case says otherwise. **Bold** is a loss, *italic* a difference within the noise."
        f"{alone} {tables.machine_line(result)}."
    )
    return [text, "\n".join(grid(head, rows)), _losses(result)]


def _in_short(result: dict) -> str:
    """The result of a suite on other vectors: the cases lost, and what is usual."""
    rows = result["rows"]
    usual = [
        f"{name}: {number(statistics.median(ratios))}×"
        for name in tables.BASELINES
        if (ratios := [r["contenders"][name]["ratio"]["value"] for r in rows
                       if "ratio" in r["contenders"].get(name, {})])
    ]  # fmt: skip
    lost = _fastest(rows)
    quick = ", a quick run" if result["quick"] else ""
    return (
        f"**The same suite on other vectors**{quick}: {tables.machine_line(result)}. Medians over "
        f"the cases: {', '.join(usual) or 'none'}. Of {len(rows)} cases a contender is faster than "
        f"ours in {': '.join([str(len(lost)), *filter(None, ['; '.join(lost)])])}." + _own(rows)
    )


def _fastest(rows: Sequence[dict], own: bool = False) -> list[str]:
    """Of each case in which others, or further ones of our own, are faster than ours, the fastest
    of them."""
    found = []
    for row in rows:
        if faster := tables.faster(row, own):
            best = min(faster, key=lambda name: faster[name]["ratio"]["value"])
            found.append(f"{row['case']} {tables.ratio_in_short(faster[best])} {best}")
    return found


def _own(rows: Sequence[dict]) -> str:
    """The cases that we lose to ourselves alone: another choice of the backend or dtype is open."""
    found = _fastest([row for row in rows if not tables.faster(row)], own=True)
    if not found:
        return ""
    return (
        f" In {len(found)} more another backend, dtype or call of our own is faster: "
        f"{'; '.join(found)}."
    )


def page(folder: Path = results.RESULTS) -> str:
    """The newest results of each suite: the main case of each operator, and every case lost."""
    found = results.newest(folder)
    parts = [_section(suite, *one) for suite in TITLES for one in found.get(suite, [])]
    parts += [_quality(path) for path in sorted(folder.glob("*.json"))]
    text = "# Results\n\nWritten by `python -m benchmarks readme`."
    return "\n\n".join([text, tables.EXPLANATION, *filter(None, parts)]) + "\n"


def _shown(result: dict) -> list[dict]:
    first = {row["operator"]: row["case"] for row in reversed(result["rows"])}
    shown = {*first.values(), *(row["case"] for row in tables.losses(result["rows"]))}
    return [row for row in result["rows"] if row["case"] in shown]


def _losses(result: dict) -> str:
    lost = len(tables.losses(result["rows"]))
    text = (
        f"Of {len(result['rows'])} cases a contender is faster than ours in {lost}; all of these "
        f"are shown.{_own(result['rows'])}"
    )
    served = [r["operator"] for r in result["rows"] if r["served_by"] == "reference"]
    names = ", ".join(dict.fromkeys(served))
    return text + (f" Operators of this run without a native version: {names}." if names else "")


def _section(suite: str, path: Path, result: dict) -> str:
    quick = " (a quick run, too few rounds for fine differences)" if result["quick"] else ""
    machine = result["machine"]
    vectors = "" if machine["gpu"] else f", {machine['cpu_features']}"
    lines = [f"## {TITLES[suite]}{vectors}{quick}", "", f"{tables.machine_line(result)}.", ""]
    if suite == "end-to-end":
        lines += tables.detectors(result)
        plot = path.with_name(f"{path.stem}-pareto.png")
        if plot.exists():
            lines += ["", f"![Quality against latency]({plot.name})"]
    else:
        lines += [*tables.summary(_shown(result)), "", _losses(result)]
    return "\n".join([*lines, "", f"Every case and contender: [{path.stem}]({path.stem}.md)."])


def _quality(path: Path) -> str:
    """What a result of the commands `quality` and `audio` says of itself in short."""
    text = results.read(path).get("summary")
    if text is None:
        return ""
    title, _, rest = text.partition("\n")
    return f"## {title.removeprefix('# ')}\n{rest}\nAll of it: [{path.stem}]({path.stem}.md)."
