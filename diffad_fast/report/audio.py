"""Pictures of clips, and the page of an evaluation with players.

A clip's picture has its spectrogram, what each band has in the score over time, and the score over
time itself, on one axis. A map's colours mean the same for every clip of one detector, unless one
is so far from normal that it would be all of the strongest: its own largest value is the end of its
scale.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data.audio_files import read_audio
from ..data.waves import extended
from .figures import BLUE, GREY, VERMILLION, colour_range, new_figure, png
from .page import Page, picture
from .tables import Table, cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..detector import Detector

_SECTION_FIGURES = {
    "auroc_source": "AUROC source",
    "auroc_target": "AUROC target",
    "pauc": "pAUC",
}
# A band with this share of the way from calm to alarming gets the strongest colour: what sounds
# wrong in half of 64 bands is then as bright as in the map of an image.
_STRONGEST = 1 / 32
# Of a clip so much can be heard: a page of long recordings would not open.
_HEARD_SECONDS = 60


def clip_figure(detector: Detector, wave: np.ndarray, map_: np.ndarray) -> Figure:
    """Spectrogram, map and curve of one clip.

    wave: (samples,) at the detector's rate, as it was read or as it was scored. map_:
    (n_mels,steps) from its score.
    """
    config = detector.config
    logmel = detector.model.representation.logmel
    whole = torch.from_numpy(extended(wave, config.window_samples, config.step_samples))
    with torch.inference_mode():
        spectrogram = logmel(whole[None].to(detector.device))[0].cpu().numpy()
    map_ = map_[:, ~np.isnan(map_[0])]
    step = config.step_samples / config.sample_rate
    seconds = map_.shape[1] * step
    low, high = colour_range(detector)

    figure = new_figure((6.4, 5.2))
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
    below.plot(time, map_.sum(axis=0), color=BLUE, linewidth=2, drawstyle="steps-mid")
    below.axhline(low, color=GREY, linewidth=1, linestyle=":", label="median of normals")
    if detector.conformal.threshold is not None:
        below.axhline(
            detector.conformal.threshold, color=VERMILLION, linestyle="--", label="threshold"
        )
    below.set(xlabel="seconds", ylabel="score", xlim=(0, seconds))
    below.legend(frameon=False, fontsize=8)
    below.spines[["top", "right"]].set_visible(False)
    return figure


class ClipPage(Page):
    """The page of an ``AudioEvaluation``."""

    unit, one, anomaly, anomalous = "clip", "a clip", "an anomaly", "anomalous"
    auroc = "auroc"
    figures = {
        "auroc": "AUROC",
        "pauc": "pAUC",
        "f1_max": "F1-max",
        "true_positive_rate": "found",
        "false_positive_rate": "false alarms",
    }
    style = """
.cases { grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); }
figure div { display: block; } figure img { width: 100%; } audio { width: 100%; }
"""
    heading = "Clips"
    note = (
        "Each: the spectrogram, the share of every mel band in the score over time "
        "(the mean over the windows at that time), and their sum. Colours of shares mean the same "
        "everywhere on this page, but where a clip's largest share is beyond their scale; those of "
        "spectrograms go from a clip's loudest band down by 80 dB. Of clips longer than "
        f"{_HEARD_SECONDS} s the beginning is to be heard."
    )

    def shape(self) -> str:
        config = self.detector.config
        return (
            f"{config.sample_rate} Hz, {config.n_mels} mel bands, windows of "
            f"{config.window_samples / config.sample_rate:.2f} s"
        )

    @staticmethod
    def tables(metrics: dict) -> Iterator[Table]:
        """Those of ``Detector.evaluate``: all clips and kinds; sections."""
        kinds = metrics["per_kind"]
        rows = [("all", metrics), *(kinds.items() if len(kinds) > 1 else ())]
        yield Table(
            ["anomaly", "clips", *ClipPage.figures.values()],
            [[name, str(row["n_anomalous"]), *cells(row, ClipPage.figures)] for name, row in rows],
        )
        if "sections" in metrics:
            none = dict.fromkeys(_SECTION_FIGURES)  # of a domain that is not there
            mean = {"harmonic_mean": metrics["harmonic_mean"], "undefined": {}}
            rows = [
                *([name, *cells(none | row, none)] for name, row in metrics["sections"].items()),
                ["harmonic mean", *cells(mean, ["harmonic_mean"]), "", ""],
            ]
            yield Table(["section", *_SECTION_FIGURES.values()], rows)

    def cases(self, rows: Sequence[int]) -> Iterator[str]:
        rate = self.detector.config.sample_rate
        for i in rows:
            clip = self.evaluation.clips[i]
            wave = read_audio(clip.path, rate)
            drawn = png(clip_figure(self.detector, wave, self.evaluation.score.map[i]))
            sound = base64.b64encode(_wav(wave[: _HEARD_SECONDS * rate], rate)).decode()
            yield (
                f"<figure><div>{picture(drawn, 'spectrogram, anomaly map and score over time')}"
                f"</div><audio controls preload='none' src='data:audio/wav;base64,{sound}'></audio>"
                f"{self.caption(i, clip.kind, clip.path)}</figure>"
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
