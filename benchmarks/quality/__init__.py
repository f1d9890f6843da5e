"""`python -m benchmarks quality`: accuracy beside closed-form controls, over seeds.

`data.py` finds the data sets and their dev and report parts, `controls.py` holds the closed forms,
`run.py` fits and measures, `tables.py` writes what came out.
"""

from .run import main

__all__ = ["main"]
