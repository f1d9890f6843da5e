"""Accuracy of whole detectors beside controls, over seeds, in two commands.

`run.py` is `python -m benchmarks quality`, on images and tables: `data.py` finds the data sets and
their dev and report parts, `controls.py` holds closed forms on the detector's own tokens, `dte.py`
and `anoddpm.py` run public detectors from their authors' code, which `clones.py` imports.
`audio.py` is `python -m benchmarks audio`, on UrbanSound8K. `tables.py` writes what came out.
"""
