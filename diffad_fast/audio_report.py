"""What an evaluation of clips looks like: pictures of single clips, and one HTML page with players.

A clip's picture has its spectrogram, what each band has in the score over time, and the score over
time itself, on one axis. A map's colours mean the same for every clip of one detector, unless one
is so far from normal that it would be all of the strongest: its own largest value is the end of its
scale.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import report
from .data.audio import extended, read_audio
from .files import result_folder
from .version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .detector import Detector
    from .evaluation import AudioEvaluation

FIGURES = {
    "auroc": "AUROC",
    "pauc": "pAUC",
    "f1_max": "F1-max",
    "true_positive_rate": "found",
    "false_positive_rate": "false alarms",
}
"""The figures of all clips in tables: their order, and their names there."""

_STYLE = """
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); gap: 1rem; }
.clips figure div { display: block; } .clips figure img { width: 100%; } audio { width: 100%; }
"""
# A band with this share of the way from calm to alarming gets the strongest colour: what sounds
# wrong in half of 64 bands is then as bright as in the map of an image.
_STRONGEST = 1 / 32
# Of a clip so much can be heard: a page of long recordings would not open.
_HEARD_SECONDS = 60


def tables(metrics: dict) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(head, rows) of the tables of ``Detector.evaluate``: all clips and kinds; sections."""

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = [["all", str(metrics["n_anomalous"]), *(text(metrics[key]) for key in FIGURES)]]
    if len(metrics["per_kind"]) > 1:
        for kind, row in metrics["per_kind"].items():
            rows.append(
                [
                    kind,
                    str(row["n_anomalous"]),
                    *(text(row[k]) if k in row else "" for k in FIGURES),
                ]
            )
    yield ["anomaly", "clips", *FIGURES.values()], rows
    if "sections" in metrics:
        names = ["auroc_source", "auroc_target", "pauc"]
        rows = [
            [name, *(text(row.get(key)) for key in names)]
            for name, row in metrics["sections"].items()
        ]
        rows.append(["harmonic mean", text(metrics["harmonic_mean"]), "", ""])
        yield ["section", "AUROC source", "AUROC target", "pAUC"], rows


def clip_figure(detector: Detector, wave: np.ndarray, map_: np.ndarray) -> Figure:
    """Spectrogram, map and curve of one clip.

    wave: (samples,) at the detector's rate, as it was read or as it was scored. map_:
    (n_mels,steps) from its score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config = detector.config
    logmel = detector.model.representation.logmel
    whole = torch.from_numpy(extended(wave, config.window_samples, config.step_samples))
    with torch.inference_mode():
        spectrogram = logmel(whole[None].to(detector.device))[0].cpu().numpy()
    map_ = map_[:, ~np.isnan(map_[0])]
    step = config.step_samples / config.sample_rate
    seconds = map_.shape[1] * step
    low, high = report.colour_range(detector)

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    extent = (0, seconds, 0, config.n_mels)
    top = float(spectrogram.max())
    shown = above.imshow(
        spectrogram, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top,
        cmap="magma",
    )  # fmt: skip
    figure.colorbar(shown, ax=above, label="dB")
    shown = middle.imshow(
        map_, origin="lower", aspect="auto", extent=extent, vmin=0,
        vmax=max((high - low) * _STRONGEST, map_.max()), cmap="inferno", interpolation="nearest",
    )  # fmt: skip
    figure.colorbar(shown, ax=middle, label="share of the score")
    for axes, title in ((above, "log-mel spectrogram"), (middle, "anomaly map")):
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("mel band")
    time = (np.arange(map_.shape[1]) + 0.5) * step
    below.plot(time, map_.sum(axis=0), color=report._BLUE, linewidth=2, drawstyle="steps-mid")
    below.axhline(low, color=report._GREY, linewidth=1, linestyle=":", label="median of normals")
    if detector.conformal.threshold is not None:
        below.axhline(
            detector.conformal.threshold, color=report._VERMILLION, linestyle="--",
            label="threshold",
        )  # fmt: skip
    below.set(xlabel="seconds", ylabel="score", xlim=(0, seconds))
    below.legend(frameon=False, fontsize=8)
    below.spines[["top", "right"]].set_visible(False)
    return figure


def png(figure: Figure) -> bytes:
    """A picture as the bytes of a PNG file."""
    return report._png(figure)


def write_audio_report(
    folder: str | os.PathLike, detector: Detector, evaluation: AudioEvaluation
) -> None:
    """Write ``folder``/index.html: figures, ROC curve, histogram, worst and best clips to hear.

    The page holds pictures and sounds itself. Raises InputError where ``folder`` cannot be written.
    """
    with result_folder(folder) as staged:
        (staged / "index.html").write_text(
            _page(detector, evaluation), encoding="utf-8", errors="replace"
        )


def _page(detector: Detector, evaluation: AudioEvaluation) -> str:
    config, metrics = detector.config, evaluation.metrics
    facts = [
        f"{metrics['n_normal']} normal and {metrics['n_anomalous']} anomalous clips",
        f"{config.sample_rate} Hz, {config.n_mels} mel bands, windows of "
        f"{config.window_samples / config.sample_rate:.2f} s",
        f"{config.denoiser}, mode {config.mode}",
        f"{detector.history.steps} training steps in {detector.history.seconds:.0f} s",
        f"{metrics['latency_ms']:.1f} ms a clip on {detector.device}",
        f"diffad_fast {__version__}",
    ]
    if evaluation.score.skipped:
        facts.append(f"{len(evaluation.score.skipped)} unusable clips left out")
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<title>diffad_fast report</title>",
        f"<style>{report._STYLE}{_STYLE}</style></head><body>",
        "<h1>Anomaly detection report</h1>",
        f"<p class='note'>{' · '.join(map(html.escape, facts))}</p>",
        "<h2>Figures</h2>",
        *_tables(metrics),
        "<h2>Scores</h2>",
        f"<p>{html.escape(report.threshold_sentence(detector, 'clips'))}</p>",
        "<div class='plots'>",
        *report.plots(detector, evaluation, "auroc"),
        "</div>",
        "<h2>Clips</h2>",
        "<p class='note'>Each: the spectrogram, the share of every mel band in the score over time "
        "(the mean over the windows at that time), and their sum. Colours of shares mean the same "
        "everywhere on this page, but where a clip's largest share is beyond their scale; those of "
        "spectrograms go from a clip's loudest band down by 80 dB. Of clips longer than "
        f"{_HEARD_SECONDS} s the beginning is to be heard.</p>",
        *_cases(detector, evaluation),
        "</body></html>",
    ]
    return "\n".join(parts)


def _tables(metrics: dict) -> Iterator[str]:
    for head, rows in tables(metrics):
        yield "<table><thead><tr>"
        yield "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr></thead><tbody>"
        for row in rows:
            yield "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        yield "</tbody></table>"
    for key, reason in metrics["undefined"].items():
        yield f"<p class='note'>- {html.escape(f'{FIGURES.get(key, key)}: {reason}')}</p>"


def _cases(detector: Detector, evaluation: AudioEvaluation) -> Iterator[str]:
    for title, rows in report.case_rows(evaluation, "clip", "an anomaly"):
        yield f"<h3>{title}</h3><div class='clips'>"
        for i in rows:
            yield _case(detector, evaluation, i)
        yield "</div>"


def _case(detector: Detector, evaluation: AudioEvaluation, i: int) -> str:
    clip, score = evaluation.clips[i], evaluation.score
    rate = detector.config.sample_rate
    wave = read_audio(clip.path, rate)
    picture = png(clip_figure(detector, wave, score.map[i]))
    caption = html.escape(report.caption(evaluation, i, clip.kind, clip.path))
    sound = base64.b64encode(_wav(wave[: _HEARD_SECONDS * rate], rate)).decode()
    return (
        f"<figure><div>{report._img(picture, 'spectrogram, anomaly map and score over time')}</div>"
        f"<audio controls preload='none' src='data:audio/wav;base64,{sound}'></audio>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _wav(wave: np.ndarray, rate: int) -> bytes:
    """A wave (samples,) in [-1, 1] as the bytes of a 16-bit WAV file."""
    import wave as wav

    stream = io.BytesIO()
    with wav.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes())
    return stream.getvalue()
