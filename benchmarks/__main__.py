"""`python -m benchmarks SUITE [options]`; `python -m benchmarks SUITE --help` lists the options."""

from __future__ import annotations

import sys

SUITES = {
    "cpu": "operators on this CPU against their baselines",
    "quality": "accuracy, time and memory of whole detectors on a data set",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in SUITES:
        print("usage: python -m benchmarks SUITE [--help]\n", file=sys.stderr)
        for name, text in SUITES.items():
            print(f"  {name:8} {text}", file=sys.stderr)
        return 2
    from importlib import import_module

    return import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
