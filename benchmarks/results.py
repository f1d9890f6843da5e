"""Results on disk: one JSON file a suite, machine and day, with its table and plots beside it."""

from __future__ import annotations

import json
from pathlib import Path

from .machine import slug

RESULTS = Path(__file__).parent / "results"


def write(result: dict, folder: Path = RESULTS) -> Path:
    """Write ``<machine>-<date>-<suite>.json``, the same as Markdown, and the plots. What a quick or
    a filtered run gives has a name of its own: it must not replace the day's whole result."""
    from . import plots, tables

    folder.mkdir(parents=True, exist_ok=True)
    name = f"{slug(result['machine'])}-{result['machine']['date']}-{result['suite']}"
    marks = "".join(f"-{mark}" for mark in ("quick", "filtered") if result.get(mark))
    path = folder / f"{name}{marks}.json"
    path.write_text(_dump(result), encoding="utf-8")
    drawn = plots.draw(result, path.with_suffix(""))
    path.with_suffix(".md").write_text(tables.markdown(result, drawn), encoding="utf-8")
    return path


def write_quality(name: str, result: dict, table: str) -> None:
    """Keep a result of ``quality`` or ``audio`` under its own name, with its table in Markdown."""
    from . import plots

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    result.setdefault("summary", table)  # what README shows
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure = plots.quality(result) if "sets" in result else None
    if figure is not None:
        figure.savefig(RESULTS / f"{name}.png", dpi=130)
        table += f"\n![Quality against latency]({name}.png)\n"
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    print(f"written to {path} and {path.with_suffix('.md').name}")


def read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def newest(folder: Path = RESULTS) -> dict[str, list[tuple[Path, dict]]]:
    """Suite -> its newest results, one of a GPU or of each kind of a processor's vectors, those of
    512 bits first; a quick one, or one of some cases alone, only where there is no whole one."""
    found: dict[tuple[str, str], tuple[tuple, Path, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        result = read(path)
        if "suite" not in result:
            continue
        machine = result["machine"]
        key = result["suite"], "" if machine["gpu"] else machine["cpu_features"]
        whole = not (result["quick"] or result.get("filtered"))
        rank = (whole, machine["date"], machine.get("time", ""), path.name)
        if key not in found or rank > found[key][0]:
            found[key] = (rank, path, result)
    suites: dict[str, list[tuple[Path, dict]]] = {}
    for key in sorted(found, key=lambda key: (key[1] != "AVX512", key[1] != "AVX2", key)):
        suites.setdefault(key[0], []).append(found[key][1:])
    return suites


def _dump(result: dict) -> str:
    """JSON with an entry a line, but all of one contender, samples too, in one line."""
    text: list[str] = []
    for line in json.dumps(result, indent=1, default=float).split("\n"):
        entry = line.lstrip()
        depth = len(line) - len(entry)
        # What lies deeper than a contender's name, and the bracket that closes it.
        if depth > 4 or (depth == 4 and entry[0] in "]}"):
            text[-1] += entry
        else:
            text.append(line)
    return "\n".join(text) + "\n"
