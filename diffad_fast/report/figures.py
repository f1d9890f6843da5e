"""Matplotlib's figures of a report: ROC curve, histogram of scores, and what all figures share."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..detector import Detector
    from ..evaluation import AudioEvaluation, Evaluation

# Okabe & Ito's palette: told apart with any colour vision, and in grey.
BLUE, VERMILLION, BLACK, GREY = "#0072B2", "#D55E00", "#000000", "#767676"


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty one, of so many inches."""
    # The object interface: pyplot would change the caller's own figures and backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


def colour_range(detector: Detector) -> tuple[float, float]:
    """(low, high) of the colours of maps: from the median score of held-out normals to as far above
    it as four times the way to the threshold (to the highest of these scores, without one)."""
    scores = detector.conformal.scores
    low = float(np.median(scores))
    threshold = detector.conformal.threshold
    spread = (float(scores[-1]) if threshold is None else threshold) - low
    if spread <= 0:  # one normal, or all alike
        spread = abs(low) or 1.0
    return low, low + 4 * spread


def roc_curve(evaluation: Evaluation | AudioEvaluation, auroc: float) -> Figure:
    """With the operating point of the detector's own threshold."""
    from sklearn import metrics

    false, true, _ = metrics.roc_curve(
        evaluation.label, evaluation.score.score, drop_intermediate=False
    )
    figure, axes = _plot()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="chance")
    axes.plot(false, true, color=BLUE, linewidth=2, label=f"AUROC {auroc:.3f}")
    point = [evaluation.metrics[key] for key in ("false_positive_rate", "true_positive_rate")]
    if None not in point:
        label = f"threshold: {point[1]:.0%} found, {point[0]:.0%} false alarms"
        axes.plot(*point, "o", color=VERMILLION, markersize=8, label=label, clip_on=False)
    axes.set(
        xlabel="false alarms, share of normals", ylabel="found, share of anomalies",
        xlim=(-0.01, 1), ylim=(0, 1.01), title="ROC curve",
    )  # fmt: skip
    axes.legend(loc="lower right", frameon=False)
    return figure


def histogram(detector: Detector, evaluation: Evaluation | AudioEvaluation) -> Figure:
    """Of the scores of normals and of anomalies."""
    scores, threshold = evaluation.score.score, detector.conformal.threshold
    low, high = colour_range(detector)
    width = (high - low) / 4

    # Linear around the normals, logarithmic far above them, where defects may score a hundredfold.
    def forward(value):
        return np.arcsinh((np.asarray(value) - low) / width)

    def inverse(value):
        return np.sinh(value) * width + low

    figure, axes = _plot()
    ends = forward([scores.min(), scores.max()])
    bins = inverse(np.linspace(ends[0] - 0.05, ends[1] + 0.05, 41))
    axes.set_xscale("function", functions=(forward, inverse))
    for value, name, colour in ((0, "normal", BLUE), (1, "anomalous", VERMILLION)):
        part = scores[evaluation.label == value]
        if len(part):
            axes.hist(
                part, bins, histtype="stepfilled", color=colour, alpha=0.5, edgecolor=colour,
                label=f"{name} ({len(part)})",
            )  # fmt: skip
    if threshold is not None:
        axes.axvline(threshold, color=BLACK, linewidth=1.5, linestyle="--", label="threshold")
    axes.set_xticks(_ticks(inverse(np.linspace(*ends, 6))))
    axes.set(xlabel="score", ylabel="number", title="Scores")
    axes.legend(frameon=False)
    return figure


def _ticks(values: np.ndarray) -> list[float]:
    """The values to two digits, so that labels are short; each once."""
    return sorted({float(f"{value:.2g}") for value in values})


def _plot() -> tuple[Figure, Axes]:
    figure = new_figure((5, 4.4))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes
