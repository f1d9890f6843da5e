"""Public diffusion detectors of tables, run from a clone of their authors' code.

Livernoche, Jain, Hezaveh and Ravanbakhsh, "On Diffusion Modeling for Anomaly Detection", ICLR 2024
(https://github.com/vicliv/DTE): DDPM reconstructs in 250 steps; DTE estimates how long a row has
been diffused, DTE-C by a classifier, DTE-NP by the nearest normals.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .clones import imported
from .controls import standardised

REPOSITORY = "github.com/vicliv/DTE"
DETECTORS = {
    "DTE-NP": ("non_param_dte", "DTENonParametric"),
    "DTE-C": ("dte", "DTECategorical"),
    "DDPM": ("ddpm", "DDPM"),
}
# DDPM's code takes no single row.
LATENCY_ROWS, LATENCY_RUNS = 2, 5


def detectors(
    clone: Path, train: np.ndarray, test: np.ndarray, seed: int
) -> Iterator[tuple[str, np.ndarray, dict]]:
    """(name, scores of ``test``, costs) of each with its defaults, trained on all of ``train``."""
    train, test = standardised(train, test)
    for name, (module, kind) in DETECTORS.items():
        make = getattr(imported(clone, f"diffusion.{module}", REPOSITORY), kind)
        torch.manual_seed(seed)
        np.random.seed(seed)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, of values that their scores leave out
            began = time.perf_counter()
            detector = make(seed=seed).fit(train)
            seconds = time.perf_counter() - began
            scores = detector.predict_score(test)
            times = []
            for _ in range(LATENCY_RUNS):
                began = time.perf_counter()
                detector.predict_score(test[:LATENCY_ROWS])
                times.append(time.perf_counter() - began)
        # NaN counts as 0 in their run.py.
        scores = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=0.0)
        latency = statistics.median(times) * 1e3
        yield name, scores, {"fit_seconds": seconds, "latency_ms": latency}
