"""Plots from a result, and from nothing else. Small PNG files beside the JSON."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np

from .case import OURS, REFERENCE
from .stats import slope

AXES = {
    "batch": "images in a batch",
    "side": "side in pixels (the Haar level grows along)",
    "steps": "reverse steps",
}
LOWEST = 15.0  # points of AUROC below the best method
COLOURS = {OURS: "#c0392b", REFERENCE: "#34495e", f"{REFERENCE}, channels_last": "#7f8c8d"}


def draw(result: dict, stem: Path) -> list[Path]:
    """Write the plots that the result has data for as ``<stem>-<plot>.png``; none without
    matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return []
    if result["suite"] == "end-to-end":
        wanted = [pareto]
    else:
        wanted = [bars, roofline, growth] if result.get("rows") else []
        wanted += [curves] if result.get("curves") else []
    paths = []
    for make in wanted:
        figure = make(result)
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{make.__name__}.png")
            figure.savefig(path, dpi=90)
            paths.append(path)
    return paths


def bars(result: dict):
    """How many times our time each baseline takes: the first case of each operator."""
    rows = {}
    for row in result["rows"]:
        if "p50" in row["contenders"][OURS]:
            rows.setdefault(row["operator"], row)
    shades = {"slower": "#c0392b", "even": "#95a5a6", "faster": "#2980b9"}
    labels, values, colours, errors = [], [], [], []
    for row in rows.values():
        for name, entry in row["contenders"].items():
            if "ratio" in entry:
                ratio = entry["ratio"]
                labels.append(f"{row['operator']}: {name}")
                values.append(ratio["value"])
                errors.append((ratio["value"] - ratio["low"], ratio["high"] - ratio["value"]))
                colours.append(shades[ratio["ours_is"]])
    if not labels:
        return None
    figure, axes = _figure(7.5, 0.8 + 0.24 * len(labels))
    y = np.arange(len(labels))[::-1]
    # Bars start at 1, where both are as fast.
    lengths = np.array(values) - 1
    errors = np.maximum(np.array(errors).T, 0)
    axes.barh(y, lengths, left=1, color=colours, xerr=errors, ecolor="#555555")
    text = "time of the other / time of ours (red: we lose, grey: no difference)"
    axes.set(xscale="log", yticks=y, xlabel=text, ylim=(-1, len(labels)))
    _plain_ticks(axes.xaxis)
    axes.set_yticklabels(labels, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    return figure


def roofline(result: dict):
    """What our operators reach of copy bandwidth and matrix rate."""
    ceilings = result["ceilings"]
    points = [
        (row["flops"] / row["bytes"], row["flops"] / row["contenders"][OURS]["p50"] / 1e6, row)
        for row in result["rows"]
        if row["bytes"] and row["flops"] and "p50" in row["contenders"][OURS]
    ]
    if not points:
        return None
    figure, axes = _figure(6.5, 4.5)
    rate, bandwidth = ceilings["matrix_gflop_per_s"]["float32"], ceilings["copy_gb_per_s"]
    intensity = [p[0] for p in points]
    x = np.geomspace(min(intensity) / 2, max(rate / bandwidth, *intensity) * 2)
    axes.plot(x, np.minimum(bandwidth * x, rate), color="black", label="measured ceilings")
    operators = list(dict.fromkeys(p[2]["operator"] for p in points))
    for number, operator in enumerate(operators):
        mine = [p for p in points if p[2]["operator"] == operator]
        axes.scatter(
            [p[0] for p in mine], [p[1] for p in mine], s=22, label=operator,
            color=f"C{number % 10}", marker="os^Dv"[number % 5],
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs for each byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=7)
    return figure


def growth(result: dict):
    """Time of a whole score against batch, resolution and steps; b of time ~ x^b in the legend."""
    rows = [row for row in result["rows"] if row["sweep"]]
    found = [axis for axis in AXES if sum(axis in row["sweep"] for row in rows) > 1]
    if not found:
        return None
    figure, all_axes = _figure(3.6 * len(found), 3.4, len(found))
    for axes, axis in zip(np.atleast_1d(all_axes), found, strict=True):
        mine = sorted((row for row in rows if axis in row["sweep"]), key=lambda r: r["sweep"][axis])
        for name, colour in COLOURS.items():
            points = [
                (row["sweep"][axis], row["contenders"][name]) for row in mine
                if "p50" in row["contenders"].get(name, {})
            ]  # fmt: skip
            if len(points) < 2:
                continue
            x, y = [p[0] for p in points], [p[1]["p50"] for p in points]
            spread = [[p[1]["p50"] - p[1]["p20"] for p in points]]
            spread += [[p[1]["p80"] - p[1]["p50"] for p in points]]
            label = f"{name}, slope {slope(x, y):.2f}"
            axes.errorbar(x, y, yerr=spread, marker="o", markersize=3, color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel="ms a call")
        axes.set_xticks(x, [str(value) for value in x], minor=False)
        axes.set_xticks([], minor=True)
        _plain_ticks(axes.yaxis)
        axes.legend(fontsize=7)
    return figure


def pareto(result: dict):
    """Image AUROC and AUPRO of detectors against milliseconds an image at batch 1; the line joins
    those that no other one beats in both."""
    figure, all_axes = _figure(10, 4.2, 2)
    entries = result["rows"][0]["contenders"]
    for axes, key, title in zip(
        all_axes, ("image_auroc", "aupro"), ("image AUROC", "AUPRO"), strict=True
    ):
        best, front = 0.0, []
        for i, (name, entry) in enumerate(sorted(entries.items(), key=_time)):
            value = result["quality"].get(name, {}).get(key)
            if "p50" not in entry:
                continue
            if value is None:  # time alone is known
                if "U-Net" in name:
                    axes.axvline(entry["p50"], color="#7f8c8d", linestyle=":")
                    axes.annotate(name, (entry["p50"], 0.5), rotation=90, fontsize=6, ha="right",
                                  va="bottom", xycoords=("data", "axes fraction"))  # fmt: skip
                continue
            colour = "#c0392b" if name.startswith(OURS) else "#34495e"
            axes.plot(entry["p50"], 100 * value, "o", color=colour, markersize=5)
            if value > best:
                best = value
                front.append((entry["p50"], 100 * value))
            place = (entry["p50"], 100 * value)
            axes.annotate(name, place, fontsize=6, xytext=(4, (3, -8, 12)[i % 3]),
                          textcoords="offset points")  # fmt: skip
        axes.plot(*zip(*front, strict=True), color="#bbbbbb", linewidth=1, zorder=0)
        axes.set(xscale="log", xlabel="ms an image, batch 1", ylabel=f"{title} in %")
        _plain_ticks(axes.xaxis, subs=(1,))
    return figure


def quality(result: dict):
    """AUROC of a method, mean and spread over seeds, against milliseconds an image at batch 1; an
    axes for each image set. What lies more than LOWEST below the best stands on the lower edge."""
    sets = [one for one in result["sets"] if one["kind"] == "image"]
    if not sets:
        return None
    figure, all_axes = _figure(10 * len(sets), 4, len(sets))
    for axes, one in zip(np.atleast_1d(all_axes), sets, strict=True):
        aurocs = {m: [100 * run["image_auroc"] for run in r] for m, r in one["runs"].items()}
        edge = max(map(np.mean, aurocs.values())) - LOWEST
        for i, (method, values) in enumerate(aurocs.items()):
            time = float(np.median([cost["latency_ms"] for cost in one["costs"][method]]))
            mean = statistics.mean(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0  # as in the tables
            below = mean < edge
            axes.errorbar(
                time, max(mean, edge), 0 if below else spread, label=f"{method}: {mean:.1f}",
                fmt="v" if below else "*" if method.startswith(OURS) else "o",
                color=f"C{i % 10}", markersize=9 if method.startswith(OURS) else 6,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="ms an image, batch 1", ylabel="image AUROC in %")
        axes.set_title(one["name"], fontsize=8)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        _plain_ticks(axes.xaxis, subs=(1, 2, 5))
    return figure


def curves(result: dict):
    """Held-out loss by step of both training loops, a line a seed."""
    entries = result["curves"]
    figure, all_axes = _figure(5 * len(entries), 3.6, len(entries))
    for axes, entry in zip(np.atleast_1d(all_axes), entries, strict=True):
        for name, style in ((REFERENCE, "--"), (OURS, "-")):
            for i, curve in enumerate(entry["curves"][name]):
                steps, losses = zip(*curve, strict=True)
                axes.plot(steps, losses, style, color=COLOURS[name], linewidth=1.2,
                          label=None if i else name)  # fmt: skip
        axes.set(xlabel="step", ylabel="held-out loss")
        axes.set_title(entry["name"], fontsize=8)
        axes.legend(fontsize=7)
    return figure


def _time(item: tuple[str, dict]) -> float:
    return item[1].get("p50", float("inf"))


def _plain_ticks(axis, subs=(1, 2, 5)) -> None:
    """Numbers instead of powers of ten on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float, columns: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)
