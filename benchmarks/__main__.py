"""`python -m benchmarks SUITE [options]`; `--help` lists suites and options."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from . import arguments

SUITES = {
    "cpu": "operators on the CPU against their baselines and peers",
    "gpu": "the same on the GPU",
    "train": "the training step, images per second",
    "metrics": "AUROC, AUPRO, ... against scikit-learn and the usual loops",
    "plugins": "a call through scikit-learn, PyOD, diffusers and anomalib against the direct call",
    "end-to-end": "quality against latency of whole detectors on a data set",
    "compile-report": "registers, shared memory and spills of every CUDA and Triton kernel",
    "all": "all of the above that this machine can run",
}
# With a command line of their own: the module, and what it does.
COMMANDS = {
    "quality": (
        "quality.run", "accuracy, time and memory of our detectors on a data set, over seeds",
    ),
    "audio": (
        "quality.audio", "accuracy and speed of the audio detector on UrbanSound8K, over seeds",
    ),
    "compare": ("compare", "what got faster or slower between two results"),
    "readme": ("readme", "write the newest results into README.md"),
}  # fmt: skip


def main() -> int:
    argv = sys.argv[1:]
    if argv and argv[0] in COMMANDS:
        module, _ = COMMANDS[argv[0]]
        run, args = importlib.import_module(f"benchmarks.{module}").main, argv[1:]
    else:
        args = _parser().parse_args(argv)
        from .suites import run
    from diffad_fast.errors import DiffadError

    try:
        return run(args)
    except DiffadError as error:  # its message is a sentence for the user
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    known = SUITES | {name: text for name, (_, text) in COMMANDS.items()}
    lines = [f"  {name:15} {text}" for name, text in known.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="suites and commands:\n" + "\n".join(lines),
        epilog="quality, audio, compare and readme have options of their own: add --help. Exit "
        "status 1: a contender's result was wrong, or --baseline shows that ours got slower; 2: "
        "what was asked for cannot be done, and nothing was measured.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=list(SUITES), metavar="SUITE")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what the suite is for")
    parser.add_argument(
        "--filter", default="", type=arguments.regex, metavar="REGEX",
        help="cases by name; the result lies apart from that of the whole suite",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", type=arguments.result, metavar="JSON", help="compare with it at the end"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds")
    parser.add_argument("--seconds", type=float, help="for the rounds of a case (default: 2)")
    parser.add_argument(
        "--compile-seconds", type=float, metavar="SECONDS",
        help="leave out compiled baselines after so much torch.compile (default: never)",
    )  # fmt: skip
    end_to_end = parser.add_argument_group("end-to-end")
    end_to_end.add_argument(
        "--data", type=arguments.folder, help="MVTec AD layout; default: the demo's images"
    )
    end_to_end.add_argument("--size", type=int, default=128, help="side in pixels (%(default)s)")
    end_to_end.add_argument(
        "--train-steps", type=int, help="of the U-Net; default: 500, with --quick 20"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
