"""`python -m benchmarks readme`: write the newest results into README.md, between two markers."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import results, tables

README = Path(__file__).resolve().parents[1] / "README.md"
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
    print(f"{README} has the newest results")
    return 0


def replaced(text: str, folder: Path = results.RESULTS) -> str:
    """``text`` with what is between the markers drawn anew. Raises ValueError without markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must have the lines {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{render(folder)}\n{END}{tail}"


def render(folder: Path = results.RESULTS) -> str:
    """The newest result of each suite: the main case of each operator, and every case lost."""
    found = results.newest(folder)
    parts = [_section(suite, *found[suite], folder) for suite in TITLES if suite in found] + [
        _quality(path, folder) for path in sorted(folder.glob("*.json"))
    ]
    parts = [part for part in parts if part]
    if not parts:
        return "No results yet: `python -m benchmarks cpu` writes the first ones."
    if "cpu" in found or "gpu" in found:
        parts.insert(0, tables.EXPLANATION)
    return "\n\n".join(parts)


def _section(suite: str, path: Path, result: dict, folder: Path) -> str:
    link = _link(path.with_suffix(".md"), folder)
    quick = " (a quick run, too few rounds for fine differences)" if result["quick"] else ""
    lines = [f"**{TITLES[suite]}**{quick}", "", tables.machine_line(result), ""]
    if suite == "end-to-end":
        lines += tables.detectors(result)
        plot = path.with_name(f"{path.stem}-pareto.png")
        if plot.exists():
            lines += ["", f"![Quality against latency]({_link(plot, folder)})"]
    else:
        first = {row["operator"]: row["case"] for row in reversed(result["rows"])}
        lost = [row["case"] for row in tables.losses(result["rows"])]
        shown = [r for r in result["rows"] if r["case"] in lost or r["case"] in first.values()]
        lines += tables.summary(shown)
        served = [r["operator"] for r in result["rows"] if r["served_by"] == "reference"]
        names = ", ".join(dict.fromkeys(served))
        text = f"Of {len(result['rows'])} cases a contender is faster than ours in {len(lost)}"
        lines += ["", f"{text}; all of these are shown."]
        if names:
            lines[-1] += f" No native version yet: {names}."
    return "\n".join([*lines, "", f"Every case and contender: [{path.stem}]({link})."])


def _quality(path: Path, folder: Path) -> str:
    """What a result of the commands `quality` and `audio` says of itself in short."""
    text = results.read(path).get("summary")
    if text is None:
        return ""
    title, _, rest = text.partition("\n")
    link = _link(path.with_suffix(".md"), folder)
    return f"**{title.removeprefix('# ')}**\n{rest}\nAll of it: [{path.stem}]({link})."


def _link(path: Path, folder: Path) -> str:
    if folder == results.RESULTS:
        return str(path.relative_to(README.parent))
    return path.name
