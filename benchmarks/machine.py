"""What a result must say of where it was measured, and where it is kept."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> dict:
    """Machine, versions and commit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cpu_features": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy", "PyWavelets", "diffad_fast")},
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None


def write(name: str, result: dict, table: str) -> None:
    """Keep a result as RESULTS/name.json, with its table beside it in Markdown; print the table."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table)
    print(table)
    print(f"written to {path} and {path.with_suffix('.md').name}")
