"""The HTML page of an evaluation, as far as it is the same for all kinds of samples."""

from __future__ import annotations

import base64
import html
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..version import __version__
from .figures import histogram, png, roc_curve
from .tables import Table, markup, reasons

if TYPE_CHECKING:
    from ..detector import Detector
    from ..evaluation import AudioEvaluation, Evaluation

CASES = 10
"""How many pictures a section of the report shows."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
       max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } thead th { border-bottom: 2px solid #222; }
tbody tr + tr td { border-top: 1px solid #ddd; }
.note { color: #555; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots img { max-width: 100%; width: 30rem; }
figure { margin: 0; } figure div { display: flex; gap: 3px; }
figcaption { font-size: .85rem; color: #444; overflow-wrap: anywhere; }
.cases { display: grid; gap: 1rem; }
"""


class Page(ABC):
    """One page; a kind of samples tells what is its own."""

    unit: ClassVar[str]
    one: ClassVar[str]
    """The unit with its article."""
    anomaly: ClassVar[str]
    """What an anomalous sample has, with its article; ``anomalous`` is what it is."""
    anomalous: ClassVar[str]
    figures: ClassVar[Mapping[str, str]]
    """Those in tables: their order, and their names there."""
    auroc: ClassVar[str]
    """The figure behind the ROC curve."""
    style: ClassVar[str]
    heading: ClassVar[str]
    note: str
    """On the cases, which stand below ``heading``."""
    figures_note = ""

    def __init__(self, detector: Detector, evaluation: Evaluation | AudioEvaluation):
        self.detector, self.evaluation = detector, evaluation

    @abstractmethod
    def shape(self) -> str:
        """What every sample is made into."""

    @staticmethod
    @abstractmethod
    def tables(metrics: dict) -> Iterator[Table]:
        """The figures of ``Detector.evaluate``."""

    @abstractmethod
    def cases(self, rows: Sequence[int]) -> Iterator[str]:
        """A ``figure`` for each of these samples."""

    def html(self) -> str:
        """The whole page, which holds its pictures itself."""
        metrics = self.evaluation.metrics
        parts = [
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
            "<title>diffad_fast report</title>",
            f"<style>{_STYLE}{self.style}</style></head><body>",
            "<h1>Anomaly detection report</h1>",
            _note(" · ".join(self._facts())),
            "<h2>Figures</h2>",
            *(line for table in self.tables(metrics) for line in markup(table)),
            *(_note(f"— {reason}") for reason in reasons(metrics["undefined"], self.figures)),
            self.figures_note and _note(self.figures_note),
            "<h2>Scores</h2>",
            f"<p>{html.escape(self._threshold())}</p>",
            "<div class='plots'>",
            *self._plots(),
            "</div>",
            f"<h2>{self.heading}</h2>",
            _note(self.note),
        ]
        for title, rows in self._chosen():
            parts += [f"<h3>{title}</h3><div class='cases'>", *self.cases(rows), "</div>"]
        return "\n".join([*filter(None, parts), "</body></html>"])

    def _facts(self) -> Iterator[str]:
        detector, metrics, history = self.detector, self.evaluation.metrics, self.detector.history
        yield (
            f"{metrics['n_normal']} normal and {metrics['n_anomalous']} {self.anomalous} "
            f"{self.unit}s"
        )
        yield self.shape()
        yield f"{detector.config.denoiser}, mode {detector.config.mode}"
        loss = "" if history.kept_loss is None else f", validation loss {history.kept_loss:.4f}"
        yield f"{history.steps} training steps in {history.seconds:.0f} s{loss}"
        yield f"{metrics['latency_ms']:.1f} ms {self.one} on {detector.device}"
        if skipped := self.evaluation.score.skipped:
            yield f"{len(skipped)} unusable {self.unit}s left out"
        yield f"diffad_fast {__version__}"

    def _threshold(self) -> str:
        """Where the threshold comes from."""
        conformal = self.detector.conformal
        if conformal.threshold is None:
            return f"There is no threshold: {conformal.why_no_label()}."
        count = len(conformal.scores)
        objects = f" of {conformal.groups} objects" if conformal.groups < count else ""
        return (
            f"The threshold {conformal.threshold:.3f} aims at a false-positive rate of "
            f"{conformal.false_positive_rate:g} and comes from {count} held-out normal "
            f"{self.unit}s{objects}, not from the {self.unit}s below."
        )

    def _plots(self) -> Iterator[str]:
        metrics = self.evaluation.metrics
        undefined = metrics["undefined"].get(self.auroc)
        if undefined is None:
            yield picture(png(roc_curve(self.evaluation, metrics[self.auroc])), "ROC curve")
        else:
            yield _note(f"There is no ROC curve: {undefined}")
        yield picture(png(histogram(self.detector, self.evaluation)), "histogram of scores")

    def _chosen(self) -> Iterator[tuple[str, np.ndarray]]:
        """(title, rows) of what is shown: worst normals, worst and best anomalies."""
        score, label = self.evaluation.score.score, self.evaluation.label
        ascending = np.argsort(score, kind="stable")
        normal, anomalous = ascending[label[ascending] == 0], ascending[label[ascending] == 1]
        half = -(-len(anomalous) // 2)  # none is shown both as worst and as best
        for title, rows in (
            (f"Worst normals: the highest scores of {self.unit}s without", normal[::-1]),
            ("Worst misses: the lowest scores with", anomalous[:half]),
            ("Best finds: the highest scores with", anomalous[half:][::-1]),
        ):
            if len(rows):
                yield f"{title} {self.anomaly}", rows[:CASES]

    def caption(self, row: int, kind: str, path: str) -> str:
        """What is said below a case, in HTML: its name, score, p-value and verdict."""
        score = self.evaluation.score
        text = (
            f"{kind}/{Path(path).name} · score {score.score[row]:.3f} · p {score.p_value[row]:.3f}"
        )
        if score.label is not None:
            names = {(0, 0): "correct", (0, 1): "false alarm", (1, 0): "missed", (1, 1): "found"}
            text += f" · {names[int(self.evaluation.label[row]), int(score.label[row])]}"
        return f"<figcaption>{html.escape(text)}</figcaption>"


def picture(png: bytes, name: str) -> str:
    """An image that is part of the page."""
    return f"<img alt='{name}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _note(text: str) -> str:
    return f"<p class='note'>{html.escape(text)}</p>"
