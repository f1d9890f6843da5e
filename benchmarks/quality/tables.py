"""The result of `python -m benchmarks quality` in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from diffad_fast.scoring.semantic import LARGEST_SAMPLE

from ..case import OURS
from ..grid import grid
from ..stats import compared
from ..tables import machine_line
from . import anoddpm
from .controls import CONTROLS, NEAREST, NEIGHBOURS
from .dte import DETECTORS, LATENCY_ROWS, REPOSITORY

FIGURES = {
    "image": {
        "image_auroc": "image AUROC",
        "pixel_auroc": "pixel AUROC",
        "aupro": "AUPRO",
        "f1_max": "F1-max",
    },
    "vector": {"auroc": "AUROC", "f1_max": "F1-max"},
}
# What ours is compared with.
OTHERS = (*CONTROLS, NEAREST, *DETECTORS, anoddpm.NAME)
PUBLISHED = {"steps": anoddpm.STEPS, "width": anoddpm.WIDTH}


def markdown(result: dict) -> str:
    """Everything: figures and defects."""
    lines = [summary(result)]
    for one in result["sets"]:
        lines += _defects(one)
    return "\n".join(lines) + "\n"


def summary(result: dict) -> str:
    """A row for each method and data set, the means over the vector sets, robustness."""
    options = f", options {result['options']}" if result["options"] else ""
    title = "Robustness" if _robust(result) else "Ablation" if result["variants"] else "Detection"
    controls = (
        " Gaussian, PCA residual and kNN are closed forms on the same tokens, through the same "
        f"fusion and calibration; kNN keeps at most {LARGEST_SAMPLE:,} of each source, at random."
    )
    if any(NEAREST in one["runs"] for one in result["sets"]):
        controls += (
            f" {NEAREST.capitalize()}: the mean distance to the nearest {NEIGHBOURS} of all that "
            "the others train on or hold out, standardised by these."
        )
    if any(name in one["runs"] for one in result["sets"] for name in DETECTORS):
        controls += (
            f" {', '.join(DETECTORS)}: the public diffusion detectors of Livernoche et al. (ICLR "
            f"2024), by their code ({REPOSITORY}) with its defaults, trained on all "
            f"normals, standardised by these; their time is that of {LATENCY_ROWS} rows."
        )
    if any(anoddpm.NAME in one["runs"] for one in result["sets"]):
        width, steps = (result["anoddpm"][name] for name in ("width", "steps"))
        controls += (
            f" {anoddpm.NAME}: the public diffusion detector of Wyatt et al. (CVPR Workshops 2022) "
            f"by its code ({anoddpm.REPOSITORY}) and recipe, trained on all normals: {width} "
            f"channels (published: {anoddpm.WIDTH}), {steps:,} steps of one image (published: "
            f"{anoddpm.STEPS:,}), weights averaged over the same part of the training; its map is "
            f"the squared error after {anoddpm.DISTANCE} reverse steps, its score the mean of the "
            f"highest {anoddpm.TOP:.0%} of that."
        )
    lines = [
        f"# {title} on {result['title']}, preset {result['preset']}, {result['part']} part",
        "",
        f"{machine_line(result)}; seeds {', '.join(map(str, result['seeds']))}{options}. In "
        "percent: mean and standard deviation over the seeds; in brackets the 95% bootstrap "
        "interval over objects."
        + (controls if any(one["best_control"] for one in result["sets"]) else ""),
        *([result["note"]] if result["note"] else []),
        *filter(None, map(_both_parts, result["sets"])),
        *filter(None, map(_stands_in, result["sets"])),
    ]
    for kind in ("image", "vector"):
        sets = [one for one in result["sets"] if one["kind"] == kind]
        if sets:
            lines += ["", *_table(sets, FIGURES[kind])]
            verdicts = [verdict for verdict in map(_verdict, sets) if verdict]
            lines += ["", *verdicts] if verdicts else []
    for one in result["sets"]:
        lines += _robustness(one)
    return "\n".join(lines) + "\n"


def _robust(result: dict) -> bool:
    return any(one["robustness"] for one in result["sets"])


def _both_parts(one: dict) -> str:
    """Choices saw other photographs of the same objects: no result is without that."""
    count = one.get("n_objects_in_both_parts", 0)
    return count and (
        f"The parts of {one['name']} are told by the names of single files: {count} of the "
        f"{one['n_objects']} objects of this part stand in the other one too, on other photographs."
    )


def _stands_in(one: dict) -> str:
    """Choices saw all of its rows: it may stand beside the others, and is no part of their mean."""
    dev = one.get("stands_in")
    return dev and (
        f"All rows of {one['name']} stand in {dev}, on which choices were made: it is no part of "
        "the means."
    )


def _counted(sets: list[dict]) -> list[dict]:
    """The sets over which means are taken."""
    return [one for one in sets if not one.get("stands_in")]


def headlines(result: dict) -> list[list[str]]:
    """What a result of detection, without variants and robustness, comes to: a row of the data, our
    figures and those of the best of the others; over several sets the means. No row for other
    results, nor where a public detector was made smaller than published."""
    sets = _counted(result.get("sets", []))
    if not any(one["best_control"] for one in sets) or result["variants"] or _robust(result):
        return []
    if result.get("anoddpm", PUBLISHED) != PUBLISHED:
        return []
    names = [name for name in sets[0]["runs"] if name in OTHERS]
    figures = {name: title for name, title in FIGURES[sets[0]["kind"]].items() if name != "f1_max"}
    first = next(iter(figures))
    best = max(names, key=lambda name: statistics.mean(_means(sets, name, first)))
    cells = []
    for method in (OURS, best):
        parts = [f"{title} {spread(_means(sets, method, name))}" for name, title in figures.items()]
        if len(sets) == 1:
            parts[0] += f" ({_bounds(sets[0]['intervals'][method])})"
        cells.append(", ".join(parts))
    return [[result["title"], cells[0], f"{best}: {cells[1]}"]]


def _means(sets: list[dict], method: str, figure: str) -> list[float]:
    """Over the sets, for each seed."""
    runs = zip(*(one["runs"][method] for one in sets), strict=True)
    return [statistics.mean(run[figure] for run in seed) for seed in runs]


def _bounds(interval: Sequence[float]) -> str:
    return "–".join(f"{100 * value:.1f}" for value in interval)


def _table(sets: list[dict], figures: dict[str, str]) -> list[str]:
    first = next(iter(figures))
    rows = []
    for one in sets:
        dev = f", in {one['stands_in']}" if one.get("stands_in") else ""
        for method, runs in one["runs"].items():
            row = [f"{one['name']}{dev} ({one['n_normal']} + {one['n_anomalous']})", method]
            for name in figures:
                text = spread([run[name] for run in runs])
                if name == first:
                    low, high = one["intervals"][method]
                    text += f" ({100 * low:.1f}–{100 * high:.1f})"
                row.append(text)
            for name, digits in (("fit_seconds", 0), ("latency_ms", 1)):
                values = [cost[name] for cost in one["costs"][method]]
                row.append("" if None in values else f"{statistics.median(values):.{digits}f}")
            rows.append(row)
    counted = _counted(sets)
    if len(counted) > 1:
        for method in counted[0]["runs"]:
            # The mean over the sets for each seed, then the spread over seeds.
            row = [f"mean of {len(counted)}", f"**{method}**"]
            for name in figures:
                row.append(spread(_means(counted, method, name)))
            rows.append([*row, "", ""])
    return grid(["data set", "method", *figures.values(), "fit s", "ms each"], rows)


def _verdict(one: dict) -> str:
    """Does ours beat the best of the others?"""
    if one["difference_to_best_control"] is None:
        return ""
    mean, low, high = (100 * value for value in one["difference_to_best_control"])
    return (
        f"- {one['name']}: diffad_fast {compared(low, high)} the best of the others, "
        f"{one['best_control']}: {mean:+.1f} ({low:+.1f} to {high:+.1f}), paired."
    )


def _defects(one: dict) -> list[str]:
    runs = next(iter(one["runs"].values()))
    if "per_defect" not in runs[0]:
        return []
    figures = FIGURES["image"]
    rows = [
        [
            method,
            defect,
            *(spread([r["per_defect"][defect][name] for r in runs]) for name in figures),
        ]
        for method, runs in one["runs"].items()
        for defect in runs[0]["per_defect"]
    ]
    table = grid(["method", "defect", *figures.values()], rows)
    return ["", f"## {one['name']} by defect", "", *table]


def _robustness(one: dict) -> list[str]:
    if not one["robustness"]:
        return []
    methods = one["robustness"]
    rows = []
    # The preset has the most: anomalies hidden from it, and shifts.
    for name in max((runs[0] for runs in methods.values()), key=len):
        row = [name]
        for runs in methods.values():
            values = [100 * run[name] for run in runs if name in run]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):+.1f}{spread}" if values else "")
        rows.append(row)
    head = f"Change of the AUROC on {one['name']}, in points:"
    return ["", head, "", *grid(["what", *methods], rows)]


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation in percent."""
    if any(value is None for value in values):
        return "—"
    text = f"{100 * statistics.mean(values):.1f}"
    return text + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")
