"""Accuracy, training time, latency and memory of whole detectors on a data set.

Every run is one process of its own, so that its peak memory is its own. Test images are split in
two by the SHA-256 of their file name without suffix (even: "dev", odd: "report"), normal and
defective alike: options are chosen on dev, figures are quoted on report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from .machine import describe
from .results import write_quality

FIGURES = ("image_auroc", "pixel_auroc", "aupro", "f1_max")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    parser.add_argument("--data", required=True, help="a data set in the MVTec AD layout")
    parser.add_argument("--denoiser", nargs="+", default=["unet-tiny", "unet-small"])
    parser.add_argument("--size", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--options", default="{}", help="further detector options, as JSON")
    parser.add_argument("--group-regex", help="first group: the object that a photograph shows")
    parser.add_argument("--name", default="quality", help="name of the result")
    parser.add_argument("--note", default="", help="what a reader must know, for the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(run(args, json.loads(args.one))))
        return 0

    runs = []
    for denoiser in args.denoiser:
        for size in args.size:
            for seed in args.seeds:
                one = json.dumps({"denoiser": denoiser, "image_size": size, "seed": seed})
                print(f"running {one}", file=sys.stderr, flush=True)
                command = [sys.executable, "-m", "benchmarks", "quality", *argv, "--one", one]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(done.stdout))
    result = {"machine": describe(), "data": Path(args.data).name, "note": args.note, "runs": runs}
    write_quality(args.name, result, table(result))
    return 0


def part_of(path: str) -> str:
    """ "dev" or "report", by the file's name alone."""
    even = hashlib.sha256(Path(path).stem.encode()).digest()[-1] % 2 == 0
    return "dev" if even else "report"


def run(args: argparse.Namespace, options: dict) -> dict:
    """Fit and evaluate one detector."""
    from diffad_fast import Detector
    from diffad_fast.data.images import mvtec_train
    from diffad_fast.detector import groups_by_regex
    from diffad_fast.evaluation import evaluate, figures

    options = {**json.loads(args.options), **options, "channels": args.channels}
    detector = Detector(**options)
    start = time.perf_counter()
    images = detector.open(mvtec_train(args.data))
    groups = groups_by_regex(images.paths, args.group_regex) if args.group_regex else None
    detector.fit(images, groups=groups)
    seconds = time.perf_counter() - start
    evaluation = evaluate(detector, Path(args.data), strict=False)
    parts = {}
    for part in ("dev", "report"):
        rows = [i for i, test in enumerate(evaluation.images) if part_of(test.path) == part]
        tests = [evaluation.images[i] for i in rows]
        parts[part] = figures(tests, evaluation.score.take(rows))
    return {
        "options": options,
        "parameters": sum(p.numel() for p in detector.model.denoiser.parameters()),
        "train_steps": detector.config.train_steps,
        "reverse_steps": detector.config.reverse_steps,
        "fit_seconds": seconds,
        "latency_ms": evaluation.metrics["latency_ms"],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "validation_loss": detector.history.validation_loss[-1][1],
        "all": evaluation.metrics,
        **parts,
    }


def table(result: dict) -> str:
    """Markdown: mean and standard deviation over the seeds, on the report part."""
    machine = result["machine"]
    groups: dict[tuple, list[dict]] = {}
    for one in result["runs"]:
        key = one["options"]["denoiser"], one["options"]["image_size"]
        groups.setdefault(key, []).append(one)
    first = result["runs"][0]["report"]
    defects = list(first["per_defect"])
    lines = [
        f"# Detection on {result['data']}",
        "",
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}, commit {machine['commit']}, {machine['date']}.",
        f"Report part of the test set: {first['n_normal']} normal and {first['n_anomalous']} "
        "defective images. Mean over the seeds, and standard deviation where there are several, "
        "in percent; times are of one run on a machine that also does other things.",
        *([result["note"]] if result["note"] else []),
        "",
    ]
    head = ["denoiser", "size", "seeds", "steps", "defect", "image AUROC", "pixel AUROC", "AUPRO"]
    head += ["F1-max", "fit s", "ms/image", "peak MiB"]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (denoiser, size), runs in groups.items():
        for defect in ["all", *defects]:
            row = [denoiser, str(size), str(len(runs)), str(runs[0]["train_steps"]), defect]
            for name in FIGURES:
                parts = [one["report"] for one in runs]
                if defect != "all":
                    parts = [part["per_defect"][defect] for part in parts]
                values = [part[name] for part in parts]
                row.append(_spread(values))
            if defect == "all":
                for name, digits in (("fit_seconds", 0), ("latency_ms", 1), ("peak_memory_mib", 0)):
                    row.append(f"{statistics.median(one[name] for one in runs):.{digits}f}")
            else:
                row += [""] * 3
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float | None]) -> str:
    if any(value is None for value in values):
        return "—"
    text = f"{100 * statistics.mean(values):.1f}"
    return text + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")
