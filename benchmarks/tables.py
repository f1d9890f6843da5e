"""Markdown from a result, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .case import OURS, REFERENCE
from .grid import grid, number
from .timing import SELDOM, SLOW

BASELINES = {
    REFERENCE: "reference",
    f"{REFERENCE}, channels_last": "… channels_last",
    f"{REFERENCE}, torch.compile": "… torch.compile",
}


def markdown(result: dict, drawn: Sequence[Path] = ()) -> str:
    """The whole report of a suite."""
    quick = ", quick: too few rounds for fine differences" if result["quick"] else ""
    some = f", only what matches `{result['filtered']}`" if result.get("filtered") else ""
    lines = [f"# Benchmark suite `{result['suite']}`{some}{quick}", "", *machine_lines(result), ""]
    if result["wrong"]:
        lines += ["**Wrong, and not timed:**", "", *(f"- {w}" for w in result["wrong"]), ""]
    lines += [*body(result), ""]
    if result.get("curves"):
        from .training_curves import lines as held_out

        lines += [*held_out(result["curves"]), ""]
    if result.get("scaling"):
        from .scaling import lines as processes

        lines += [*processes(result["scaling"]), ""]
    for path in drawn:
        lines += [f"![{path.stem}]({path.name})", ""]
    if result.get("rows"):
        lines += ["## Every contender", "", *_details(result["rows"]), ""]
    return "\n".join(lines)


def body(result: dict) -> list[str]:
    """The main table of a suite."""
    if result["suite"] == "end-to-end":
        return detectors(result)
    if result["suite"] == "compile-report":
        from .compile_report import table

        return table(result)
    goals = training_goals(result) if result["suite"] == "train" else []
    return [EXPLANATION, "", *summary(result["rows"]), *goals]


# How many times faster than whom a training step shall be, by device, and its memory.
TRAINING_GOALS = {
    "cpu": {
        ("unet-small, batch 16, 256×256", REFERENCE): 2.5,
        ("unet-small, batch 16, 256×256", f"{REFERENCE}, channels_last"): 1.3,
        ("token-mlp, width 256, 3 blocks, 1024 tokens of 64", REFERENCE): 1.5,
    },
    "cuda": {
        ("unet-small, batch 64, 256×256", REFERENCE): 6.0,
        ("unet-small, batch 64, 256×256", f"{REFERENCE}, channels_last, bfloat16"): 2.0,
        ("unet-small, batch 64, 256×256", f"{REFERENCE}, torch.compile, bfloat16"): 1.1,
        ("token-mlp, width 256, 3 blocks, 1024 tokens of 64", REFERENCE): 4.0,
    },
}
MEMORY_GOAL = 0.6


def training_goals(result: dict) -> list[str]:
    """What the training step reaches of what it shall; nothing for other cases."""
    table = []
    for (name, other), goal in TRAINING_GOALS[result["device"]].items():
        for row in result["rows"]:
            ours, theirs = row["contenders"][OURS], row["contenders"].get(other, {})
            if row["name"] != name or "ratio" not in theirs:
                continue
            ratio = theirs["ratio"]
            memory = _memory(row, theirs)
            table.append(
                [
                    name,
                    other,
                    f"{number(ours['per_second'])} {row['unit']}s/s",
                    f"{number(ratio['value'])}× ({number(ratio['low'])}–{number(ratio['high'])})",
                    f"{goal:g}×: {_reached(ratio['value'] >= goal)}",
                    f"{memory:.0%}",
                    f"{MEMORY_GOAL:.0%}: {_reached(memory <= MEMORY_GOAL)}",
                ]
            )
    if not table:
        return []
    head = ["training step", "against", "ours", "times faster", "goal", "memory", "goal"]
    text = (
        "Goals. Memory: the most that is held at a time in a step, with what stays between steps, "
        "ours / theirs. The latter are, in 4 bytes for each parameter, 5 vectors of ours (weights, "
        "their average, two of AdamW, gradients) and 4 of the others, whose gradients come and go."
    )
    return ["", text, "", *grid(head, table)]


# Vectors of a number for each parameter that stay between steps: ours, the others'.
STAY = 5, 4


def _memory(row: dict, theirs: dict) -> float:
    """Ours / theirs, with what stays."""
    entries = row["contenders"][OURS], theirs
    ours, other = (
        entry["counts"]["peak_bytes"] + 4 * vectors * row["parameters"]
        for entry, vectors in zip(entries, STAY, strict=True)
    )
    return ours / other


def _reached(goal: bool) -> str:
    return "reached" if goal else "missed"


# Those whose contenders have the note ONE_THREAD: results from before it have none.
ALONE = "PyWavelets, SciPy, NumPy and scikit-learn's metrics run on one thread."
EXPLANATION = (
    "Ours: median milliseconds (20th to 80th percentile). Share: of our time, what the machine "
    "takes in the same run to copy as many bytes (memory), or for as many FLOPs in torch's matrix "
    "product (matrix), whichever is longer; in brackets where the inputs stay in the cache. "
    "Neither is a hard ceiling: what only reads, or multiplies faster, may reach more than 100%. "
    "Whole networks have no share, as their work is not counted. Other columns: time of the other "
    "/ time of ours with the 95% bootstrap interval, of that run alone; more than 1 is a win for "
    "us, **bold** is a loss, to another backend, dtype or call of our own where the name begins "
    "with diffad_fast, "
    "*even* is an interval that holds 1. All in float32, unless a name or the list of every "
    "contender says otherwise, with TF32 off, and checked against the float64 reference, unless a "
    f"note tells of another function, generator or method. {ALONE}"
)


def machine_line(result: dict) -> str:
    """Where, with which torch and when, in short."""
    m = result["machine"]
    device = m["gpu"] or f"{m['cpu']}, {m['cpu_features']}, {m['cores']} cores"
    return (
        f"{device}, {m['threads']} threads, torch {m['versions']['torch']}, commit {m['commit']}, "
        f"{m['date']}"
    )


def machine_lines(result: dict) -> list[str]:
    """Where, with what, in which state, and what was missing."""
    m, versions = result["machine"], result["machine"]["versions"]
    device = m["gpu"] or f"{m['cpu']} ({m['cores']} cores, {m['cpu_features']})"
    clock = ", ".join(f"{key} {_clock(value)}" for key, value in m["clock"].items() if value)
    settings = ", ".join(f"{key} {_on_off(value)}" for key, value in m["settings"].items())
    lines = [
        f"{device}, {m['threads']} threads, Python {m['python']}, "
        + ", ".join(f"{name} {v}" for name, v in versions.items() if v)
        + f"; commit {m['commit']}, {m['date']}.",
        f"Clock and load: {clock}. Settings: {settings}.",
    ]
    if ceilings := result.get("ceilings"):
        rates = ", ".join(
            f"{name} {number(rate)} GFLOP/s"
            for name, rate in ceilings["matrix_gflop_per_s"].items()
        )
        lines.append(
            f"Ceilings: copying {number(ceilings['copy_gb_per_s'])} GB/s (read and written, "
            f"{ceilings['copy_megabytes']} MiB), into a new tensor, whose memory the system has to "
            f"find first, {number(ceilings['clone_gb_per_s'])} GB/s; torch's matrix products "
            f"{rates} ({ceilings['matrix_side']}²)."
        )
    if m["absent_peers"]:
        absent = ", ".join(f"{name} ({why})" for name, why in m["absent_peers"].items())
        lines.append(f"Absent peers: {absent}.")
    return lines


def summary(rows: Sequence[dict]) -> list[str]:
    """A line a case: ours, its share of the bound, and the ratios to the others."""
    head = ["case", "served by", "ours ms", "share", *BASELINES.values(), "peers"]
    lines = []
    for row in rows:
        found = row["contenders"]
        peers = [
            f"{name} {ratio_cell(entry)}" for name, entry in found.items()
            if name != OURS and name not in BASELINES
        ]  # fmt: skip
        lines.append(
            [
                row["case"],
                row["served_by"] or "",
                time_cell(found[OURS]),
                share_cell(row),
                *(ratio_cell(found[b]) if b in found else "" for b in BASELINES),
                "; ".join(peers),
            ]
        )
    filled = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return grid([head[i] for i in filled], ([line[i] for i in filled] for line in lines))


def losses(rows: Iterable[dict]) -> list[dict]:
    """The cases in which a contender that is not of our own code is faster than ours."""
    return [row for row in rows if faster(row)]


def faster(row: dict, own: bool = False) -> dict[str, dict]:
    """The contenders that are faster than ours: those of others, or further ones of our own."""
    return {
        name: entry
        for name, entry in row["contenders"].items()
        if name.startswith(OURS) == own and entry.get("ratio", {}).get("ours_is") == "slower"
    }


def time_cell(entry: dict) -> str:
    if "p50" not in entry:
        return why(entry)
    return f"{number(entry['p50'])} ({number(entry['p20'])}–{number(entry['p80'])})"


def ratio_cell(entry: dict) -> str:
    if "ratio" not in entry:
        return why(entry) if "p50" not in entry else f"{number(entry['p50'])} ms"
    ratio = entry["ratio"]
    value = f"{number(ratio['value'])}×"
    marks = {"slower": f"**{value}**", "even": f"*{value} even*", "faster": value}
    note = f" [{entry['settings']['note']}]" if entry["settings"].get("note") else ""
    return f"{marks[ratio['ours_is']]} ({number(ratio['low'])}–{number(ratio['high'])}){note}"


def ratio_in_short(entry: dict) -> str:
    """Without its interval."""
    if "ratio" not in entry:
        return ""
    marks = {"slower": "**{}**", "even": "*{}*", "faster": "{}"}
    return marks[entry["ratio"]["ours_is"]].format(f"{number(entry['ratio']['value'])}×")


def share_cell(row: dict) -> str:
    ours = row["contenders"][OURS].get("p50")
    # Recorded results have FLOPs of whole networks, in which each convolution is a direct sum: four
    # times what Winograd's takes.
    if not ours or "bound_ms" not in row or not row["bytes"]:
        return ""
    text = f"{row['bound_ms'] / ours:.0%} of {row['bound']}"
    return f"({text})" if row["in_cache"] and row["bound"] == "memory" else text


def detectors(result: dict) -> list[str]:
    """Quality against latency of whole detectors."""
    lines = [f"{result['data']['text']} {END_TO_END}", ""]
    head = ["detector", "image AUROC", "AUPRO", "ms/image, batch 1 (p20–p80; p99)"]
    head += ["images/s, batch 32", "time / time of ours, batch 1", "what it is"]
    table = []
    one, many = (row["contenders"] for row in result["rows"])
    for name, entry in one.items():
        quality = result["quality"].get(name, {})
        p99 = f"; {number(entry['p99'])}" if "p99" in entry else ""
        rate = many.get(name, {}).get("per_second")
        table.append(
            [
                f"**{name}**" if name == OURS else name,
                *(_percent(quality.get(key)) for key in ("image_auroc", "aupro")),
                time_cell(entry) + p99,
                number(rate) if rate else "—",
                "1" if name == OURS else ratio_cell({**entry, "settings": {}}),
                entry["settings"]["note"],
            ]
        )
    return lines + grid(head, table)


END_TO_END = (
    "Time of everything from a decoded image on the host to its score and map there. A ratio above "
    "1 means that ours is faster."
)


def _details(rows: Sequence[dict]) -> list[str]:
    head = ["case", "contender", "p20", "p50", "p80", "p99 ms", "per second", "rounds"]
    head += ["first call ms", "peak MiB", "calls", "dtype", "format", "compiled", "graph", "note"]
    table = []
    for row in rows:
        for name, entry in row["contenders"].items():
            settings = entry["settings"]
            cells = [row["case"], name]
            if "p50" in entry:
                counts = entry.get("counts", {})
                calls = counts.get("kernels", counts.get("operators"))
                peak = counts.get("peak_bytes", 0) + counts.get("numpy_peak_bytes", 0)
                cells += [number(entry[key]) for key in ("p20", "p50", "p80", "p99")]
                cells += [f"{number(entry['per_second'])} {row['unit']}s", str(len(entry["ms"]))]
                cells += [number(entry["first_call_ms"]) if "first_call_ms" in entry else ""]
                cells += [number(peak / 2**20), "" if calls is None else str(calls)]
            else:
                cells += [why(entry)] + [""] * 8
            cells += [settings["dtype"], settings["memory_format"], settings["compiled"]]
            cells += [_on_off(settings["graph"]), settings["note"]]
            table.append(cells)
    legend = (
        "First call: with compilation where there is one. Peak: the most that was held beyond the "
        "inputs, counted at the allocators of PyTorch and NumPy. Calls: kernels launched on a GPU, "
        "PyTorch operators called on a CPU, for one call. Rounds: a contender that takes "
        f"{SLOW:g} times as long as ours runs in every {SELDOM}rd, and is compared in these."
    )
    return [legend, "", *grid(head, table)]


def why(entry: dict) -> str:
    for key in ("wrong", "failed", "left_out"):
        if key in entry:
            reason = entry[key]
            if key == "left_out":
                return "same code" if reason.startswith("the same code") else "left out"
            return f"{key.upper()}: {reason}"
    return ""


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f}"


def _on_off(value) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _clock(value) -> str:
    return "/".join(number(v) for v in value) if isinstance(value, list) else str(value)
