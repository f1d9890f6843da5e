"""The suites: which cases each one runs, and how its result is written and compared."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from diffad_fast.errors import BackendError, InputError

from . import (
    cases,
    compare,
    compile_report,
    end_to_end,
    harness,
    peers,
    results,
    scaling,
    training_curves,
)  # fmt: skip
from .case import Case
from .harness import Run

# On a GPU, whose time is short, what matters most comes first: whole detectors.
FAMILIES = {"cpu": (*cases.OPERATORS, "metrics"), "gpu": cases.OPERATORS[::-1],
            "train": ("training",), "metrics": ("metrics",),
            "plugins": ("integrations",)}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run ``args.suite``; the exit status. Raises InputError and BackendError, before anything is
    measured, for what cannot be done."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError(
            "TRITON_INTERPRET=1 is set: times of the interpreter mean nothing, unset it"
        )
    if args.suite != "all":
        return _one(args.suite, args)
    gpu = args.device == "cuda" or (args.device is None and torch.cuda.is_available())
    # The metrics are among the cases of "cpu".
    first = "metrics" if args.device == "cuda" else "cpu"
    suites = [first, *(["gpu"] if gpu else []), "train", "plugins", "end-to-end"]
    suites += ["compile-report"]
    if args.baseline or args.filter:
        raise InputError("--baseline and --filter are for one suite: run that suite alone")
    return max(_one(suite, args) for suite in suites)


def _one(suite: str, args: argparse.Namespace) -> int:
    device = _device(suite, args)
    if suite == "end-to-end" and args.filter:
        raise InputError("suite end-to-end has no cases to choose from: leave out --filter")
    began, load = time.perf_counter(), list(os.getloadavg())
    print(f"suite {suite} on {device}", file=sys.stderr, flush=True)
    peers.absent()  # imports them all, before anything is timed
    if suite == "compile-report":
        result = compile_report.run(args.quick, args.filter)
        if args.filter and not result["kernels"] and not result["missing"]:
            raise InputError(f"no file with a kernel matches --filter {args.filter!r}")
    else:
        effort = harness.FULL
        if args.quick:
            effort = harness.QUICK_GPU if device.type == "cuda" else harness.QUICK
        given = {"seconds": args.seconds, "compile_seconds": args.compile_seconds}
        effort = replace(effort, **{k: v for k, v in given.items() if v is not None})
        runner = Run(device, effort, args.quick)
        if suite == "end-to-end":
            result = end_to_end.run(runner, args)
        else:
            runner.measure(_chosen(suite, device, args))
            result = runner.result(suite)
            if suite == "train" and not args.filter:
                result["curves"] = training_curves.run(device, args.quick)
                if device.type == "cpu":
                    result["scaling"] = scaling.run(args.quick)
    result["machine"]["clock"]["load_before"] = load
    result["filtered"] = args.filter
    result["seconds"] = round(time.perf_counter() - began, 1)
    path = results.write(result, args.out or results.RESULTS)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"written to {path}, .md and .png beside it, in {result['seconds']:.0f} s")
    for line in result["wrong"]:
        print(f"WRONG, not timed: {line}", file=sys.stderr)
    status = 1 if result["wrong"] else 0
    if args.baseline:
        text, slower = compare.report(args.baseline, result)
        print(text)
        status = status or (1 if slower else 0)
    return status


def _chosen(suite: str, device: torch.device, args: argparse.Namespace) -> Iterator[Case]:
    """The cases of a suite that ``--filter`` asks for."""
    every = cases.load(FAMILIES[suite], device.type, args.quick)
    found = (case for case in every if re.search(args.filter, case.key))
    first = list(itertools.islice(found, 1))
    if args.filter and not first:
        raise InputError(f"no case of the suite {suite} matches --filter {args.filter!r}")
    return itertools.chain(first, found)


def _device(suite: str, args: argparse.Namespace) -> torch.device:
    fixed = {"cpu": "cpu", "metrics": "cpu", "compile-report": "cpu", "gpu": "cuda"}.get(suite)
    cuda = torch.cuda.is_available()
    name = fixed or args.device or ("cuda" if cuda else "cpu")
    if args.suite == suite and args.device and name != args.device:
        raise InputError(f"suite {suite} runs on {name}, not on {args.device}")
    if name == "cuda" and not cuda:
        raise BackendError(
            f"suite {suite} needs a CUDA device, and torch {torch.__version__} sees none: check "
            "the driver (nvidia-smi) and that torch was built with CUDA"
        )
    return torch.device(name)
