"""What an evaluation looks like: heatmaps on images, and one HTML page that holds everything.

The colours of a heatmap mean the same on every image of one detector (:func:`colour_range`), so a
normal image looks calm and two images can be compared.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .data.images import encode_png
from .files import result_folder
from .scoring import own_part
from .version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .detector import Detector
    from .evaluation import AudioEvaluation, Evaluation

FIGURES = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "f1_max": "F1-max",
    "pixel_f1_max": "pixel F1-max",
    "true_positive_rate": "found",
    "false_positive_rate": "false alarms",
}
"""The figures of ``Detector.evaluate`` in tables: their order, and their names there."""

CASES = 10
"""How many pictures a section of the report shows."""

# Okabe & Ito's palette: told apart with any colour vision, and in grey.
_BLUE, _VERMILLION, _BLACK, _GREY = "#0072B2", "#D55E00", "#000000", "#767676"
_OUTLINE = (0, 255, 255)
# The strongest colour hides this share of the image; the rest keeps the defect itself visible.
_OPACITY = 0.75


def overlay(image: np.ndarray, map_: np.ndarray, low: float, high: float) -> np.ndarray:
    """An anomaly map drawn on its image, the more opaque the higher it is.

    image: (C,H,W) in [0,1], C 1 or 3. map_: (H,W). Values up to ``low`` leave the image as it is,
    those from ``high`` on have the strongest colour. Returns (H,W,3) uint8.
    """
    from matplotlib import colormaps

    value = np.clip((np.asarray(map_, dtype=np.float32) - low) / (high - low), 0, 1)
    # The darkest colours of inferno would be taken for shadows in the image.
    colour = colormaps["inferno"](0.25 + 0.75 * value)[..., :3]
    opacity = _OPACITY * value[..., None]
    return _bytes(_rgb(image) * (1 - opacity) + colour * opacity)


def outline(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The border of a mask drawn on an image, just outside of the marked region.

    image: (C,H,W) in [0,1]. mask: (h,w) bool of any size, None for no mark. Returns (H,W,3) uint8.
    """
    picture = _bytes(_rgb(image))
    if mask is not None:
        marked = torch.from_numpy(np.asarray(mask, dtype=np.float32))[None, None]
        # The maximum keeps regions that are smaller than a pixel of the picture.
        marked = torch.nn.functional.adaptive_max_pool2d(marked, picture.shape[:2])
        grown = torch.nn.functional.max_pool2d(marked, 3, stride=1, padding=1)
        picture[(grown - marked)[0, 0].numpy() > 0] = _OUTLINE
    return picture


def colour_range(detector: Detector) -> tuple[float, float]:
    """(low, high) for :func:`overlay`: from the median score of held-out normals to as far above
    it as four times the way to the threshold (to the highest of these scores, without one)."""
    scores = detector.conformal.scores
    low = float(np.median(scores))
    threshold = detector.conformal.threshold
    spread = (float(scores[-1]) if threshold is None else threshold) - low
    if spread <= 0:  # one normal, or all alike
        spread = abs(low) or 1.0
    return low, low + 4 * spread


def table(metrics: dict) -> list[tuple[str, dict]]:
    """The rows of a table of figures: ("all", figures), then (name, figures) for each defect."""
    return [("all", metrics), *metrics["per_defect"].items()]


def write_report(folder: str | os.PathLike, detector: Detector, evaluation: Evaluation) -> None:
    """Write ``folder``/index.html: figures, ROC curve, histogram of scores, worst and best cases.

    The page holds its pictures itself and needs no other file. Raises InputError where ``folder``
    cannot be written; a page that is there stays whole until it is replaced.
    """
    with result_folder(folder) as staged:
        page = _page(detector, evaluation)
        (staged / "index.html").write_text(page, encoding="utf-8", errors="replace")


# ------------------------------------------------------------------- page

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
       max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } thead th { border-bottom: 2px solid #222; }
tbody tr + tr td { border-top: 1px solid #ddd; }
.note { color: #555; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots img { max-width: 100%; width: 30rem; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure div { display: flex; gap: 3px; } figure img { width: 33%; }
figcaption { font-size: .85rem; color: #444; overflow-wrap: anywhere; }
"""


def _page(detector: Detector, evaluation: Evaluation) -> str:
    config, score = detector.config, evaluation.score
    metrics = evaluation.metrics
    height, width = config.image_size
    loss = detector.history.kept_loss
    facts = [
        f"{metrics['n_normal']} normal and {metrics['n_anomalous']} defective images",
        f"{height}×{width} pixels, {config.channels} channel(s)",
        f"{config.denoiser}, mode {config.mode}",
        f"{detector.history.steps} training steps in {detector.history.seconds:.0f} s"
        + ("" if loss is None else f", validation loss {loss:.4f}"),
        f"{metrics['latency_ms']:.1f} ms an image on {detector.device}",
    ]
    if score.skipped:
        facts.append(f"{len(score.skipped)} unusable images left out")
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<title>diffad_fast report</title>",
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Anomaly detection report</h1>",
        f"<p class='note'>{' · '.join(map(html.escape, facts))} · diffad_fast {__version__}</p>",
        "<h2>Figures</h2>",
        *_figures(metrics),
        "<h2>Scores</h2>",
        f"<p>{html.escape(threshold_sentence(detector, 'images'))}</p>",
        "<div class='plots'>",
        *plots(detector, evaluation, "image_auroc"),
        "</div>",
        "<h2>Cases</h2>",
        "<p class='note'>Each: the image, the anomaly map on it, the outline of the ground truth. "
        "The colours of the map mean the same everywhere on this page: none up to the median score "
        "of held-out normal images, the strongest at four times the way from there to the "
        "threshold.</p>",
        *_cases(detector, evaluation),
        "</body></html>",
    ]
    return "\n".join(parts)


def _figures(metrics: dict) -> Iterator[str]:
    names = "".join(f"<th>{name}</th>" for name in FIGURES.values())
    yield f"<table><thead><tr><th>defect</th><th>images</th>{names}</tr></thead><tbody>"
    undefined = metrics["undefined"]
    for name, row in table(metrics):
        cells = "".join(
            f"<td>{row[key]:.3f}</td>"
            if row[key] is not None
            else f"<td title='{html.escape(row['undefined'][key])}'>—</td>"
            for key in FIGURES
        )
        yield f"<tr><td>{html.escape(name)}</td><td>{row['n_anomalous']}</td>{cells}</tr>"
    yield "</tbody></table>"
    for reason in dict.fromkeys(undefined.values()):
        which = ", ".join(FIGURES.get(key, key) for key in undefined if undefined[key] == reason)
        yield f"<p class='note'>— {html.escape(which)}: {html.escape(reason)}</p>"
    yield (
        "<p class='note'>A row for a defect compares its images with all normal ones. "
        "AUPRO to a false-positive rate of 0.3; found and false alarms: shares of the defective "
        "and of the normal images that score above the detector's own threshold.</p>"
    )


def threshold_sentence(detector: Detector, unit: str) -> str:
    """Where the threshold comes from; ``unit`` in the plural."""
    conformal = detector.conformal
    if conformal.threshold is None:
        return f"There is no threshold: {conformal.why_no_label()}."
    count = len(conformal.scores)
    objects = f" of {conformal.groups} objects" if conformal.groups < count else ""
    return (
        f"The threshold {conformal.threshold:.3f} aims at a false-positive rate of "
        f"{conformal.false_positive_rate:g} and comes from {count} held-out normal training "
        f"{unit}{objects}, not from the {unit} below."
    )


# ------------------------------------------------------------------ plots


def plots(
    detector: Detector, evaluation: Evaluation | AudioEvaluation, auroc: str
) -> Iterator[str]:
    """ROC curve and histogram; ``auroc`` names that figure in the evaluation."""
    undefined = evaluation.metrics["undefined"].get(auroc)
    if undefined is None:
        yield _img(_png(_roc(evaluation, evaluation.metrics[auroc])), "ROC curve")
    else:
        yield f"<p class='note'>There is no ROC curve: {html.escape(undefined)}</p>"
    yield _img(_png(_histogram(detector, evaluation)), "histogram of scores")


def _roc(evaluation: Evaluation | AudioEvaluation, auroc: float) -> Figure:
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(evaluation.label, evaluation.score.score, drop_intermediate=False)
    figure, axes = _axes((5, 4.4))
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=":", label="chance")
    axes.plot(false, true, color=_BLUE, linewidth=2, label=f"AUROC {auroc:.3f}")
    point = [evaluation.metrics[key] for key in ("false_positive_rate", "true_positive_rate")]
    if None not in point:
        label = f"threshold: {point[1]:.0%} found, {point[0]:.0%} false alarms"
        axes.plot(*point, "o", color=_VERMILLION, markersize=8, label=label, clip_on=False)
    axes.set(
        xlabel="false alarms, share of normals", ylabel="found, share of anomalies",
        xlim=(-0.01, 1), ylim=(0, 1.01), title="ROC curve",
    )  # fmt: skip
    axes.legend(loc="lower right", frameon=False)
    return figure


def _histogram(detector: Detector, evaluation: Evaluation | AudioEvaluation) -> Figure:
    scores, threshold = evaluation.score.score, detector.conformal.threshold
    low, high = colour_range(detector)
    width = (high - low) / 4

    # Linear around the normals, logarithmic far above them, where defects may score a hundredfold.
    def forward(value):
        return np.arcsinh((np.asarray(value) - low) / width)

    def inverse(value):
        return np.sinh(value) * width + low

    figure, axes = _axes((5, 4.4))
    ends = forward([scores.min(), scores.max()])
    bins = inverse(np.linspace(ends[0] - 0.05, ends[1] + 0.05, 41))
    axes.set_xscale("function", functions=(forward, inverse))
    for value, name, colour in ((0, "normal", _BLUE), (1, "anomalous", _VERMILLION)):
        part = scores[evaluation.label == value]
        if len(part):
            axes.hist(
                part, bins, histtype="stepfilled", color=colour, alpha=0.5, edgecolor=colour,
                label=f"{name} ({len(part)})",
            )  # fmt: skip
    if threshold is not None:
        axes.axvline(threshold, color=_BLACK, linewidth=1.5, linestyle="--", label="threshold")
    axes.set_xticks(_ticks(inverse(np.linspace(*ends, 6))))
    axes.set(xlabel="score", ylabel="number", title="Scores")
    axes.legend(frameon=False)
    return figure


def _ticks(values: np.ndarray) -> list[float]:
    """The values to two digits, so that labels are short; each once."""
    return sorted({float(f"{value:.2g}") for value in values})


def _axes(size: tuple[float, float]):
    # The object interface: pyplot would change the caller's own figures and backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


# ------------------------------------------------------------------ cases


def case_rows(
    evaluation: Evaluation | AudioEvaluation, unit: str, anomaly: str
) -> Iterator[tuple[str, np.ndarray]]:
    """(title, rows) of what is shown: worst normals, worst and best anomalies."""
    score, label = evaluation.score.score, evaluation.label
    ascending = np.argsort(score, kind="stable")
    normal, anomalous = ascending[label[ascending] == 0], ascending[label[ascending] == 1]
    half = -(-len(anomalous) // 2)  # none is shown both as worst and as best
    for title, rows in (
        (f"Worst normals: the highest scores of {unit}s without {anomaly}", normal[::-1][:CASES]),
        (f"Worst misses: the lowest scores with {anomaly}", anomalous[: min(CASES, half)]),
        (f"Best finds: the highest scores with {anomaly}", anomalous[half:][::-1][:CASES]),
    ):
        if len(rows):
            yield title, rows


def caption(evaluation: Evaluation | AudioEvaluation, row: int, kind: str, path: str) -> str:
    """What is said below a case: its name, score, p-value and verdict."""
    score = evaluation.score
    text = f"{kind}/{Path(path).name} · score {score.score[row]:.3f} · p {score.p_value[row]:.3f}"
    if score.label is not None:
        names = {(0, 0): "correct", (0, 1): "false alarm", (1, 0): "missed", (1, 1): "found"}
        text += f" · {names[int(evaluation.label[row]), int(score.label[row])]}"
    return text


def _cases(detector: Detector, evaluation: Evaluation) -> Iterator[str]:
    for title, rows in case_rows(evaluation, "image", "a defect"):
        yield f"<h3>{title}</h3><div class='cases'>"
        yield from _case_figures(detector, evaluation, rows)
        yield "</div>"


def _case_figures(detector: Detector, evaluation: Evaluation, rows: Sequence[int]) -> Iterator[str]:
    from .data.images import read_mask

    score, low_high = evaluation.score, colour_range(detector)
    paths = [evaluation.images[i].path for i in rows]
    images = (batch.x[0].numpy() for batch in detector.open(paths, strict=True).batches(1))
    for i, image in zip(rows, images, strict=True):
        test = evaluation.images[i]
        mask = None if test.mask_path is None else read_mask(test.mask_path, test.path)
        pictures = (
            (_bytes(_rgb(image)), "image"),
            (overlay(image, own_part(score.map[i]), *low_high), "anomaly map"),
            (outline(image, mask), "ground truth"),
        )
        yield "<figure><div>"
        for picture, name in pictures:
            yield _img(encode_png(picture), name)
        text = html.escape(caption(evaluation, i, test.defect, test.path))
        yield f"</div><figcaption>{text}</figcaption></figure>"


def _img(png: bytes, name: str) -> str:
    return f"<img alt='{name}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _rgb(image: np.ndarray) -> np.ndarray:
    """(C,H,W) to (H,W,3)."""
    image = np.asarray(image, dtype=np.float32)
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


def _bytes(picture: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
