"""Pictures of clips, and the page of an evaluation with players.

A clip's picture has its spectrogram, what each band has in the score over time, and the score over
time itself, on one axis. A map's colours mean the same for every clip of one detector, unless one
is so far from normal that it would be all of the strongest: its own largest value is the end of its
scale.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data.audio_files import read_audio
from ..data.image_files import encode_png
from ..data.waves import extended
from ..reference.spectrogram import SMALLEST_POWER
from .figures import BLACK, BLUE, GREY, VERMILLION, colour_range
from .page import Page, picture
from .tables import Table, cells

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

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


# What the colours of a spectrogram span, in dB, and where they begin at the lowest: in silence.
_SPAN, _SILENCE = 80, 10 * np.log10(SMALLEST_POWER)
# Pixels of a clip's picture, of the panels across it, and down it those of each of them.
_SIZE, ACROSS = (800, 600), (64, 704)
SPECTROGRAM, MAP, CURVE = (24, 216), (244, 436), (464, 572)


def clip_picture(detector: Detector, wave: np.ndarray, map_: np.ndarray) -> np.ndarray:
    """Spectrogram, map and curve of one clip, (H,W,3) uint8.

    wave: (samples,) at the detector's rate, as it was read or as it was scored. map_:
    (n_mels,steps) from its score.
    """
    from PIL import Image, ImageDraw

    config, conformal = detector.config, detector.conformal
    logmel = detector.model.representation.logmel
    whole = torch.from_numpy(extended(wave, config.window_samples, config.step_samples))
    with torch.inference_mode():
        spectrogram = logmel(whole[None].to(detector.device))[0].cpu().numpy()
    map_ = map_[:, ~np.isnan(map_[0])]
    seconds = map_.shape[1] * config.step_samples / config.sample_rate
    low, high = colour_range(detector)
    floor = max(float(spectrogram.max()) - _SPAN, _SILENCE)
    strongest = max((high - low) * _STRONGEST, float(map_.max()))

    # Matplotlib, which would need half a second, gives colours, ticks and letters.
    shown = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(shown)
    hertz = _hertz(logmel.frequencies)
    for title, panel, values, ends, colours in (
        ("log-mel spectrogram, dB", SPECTROGRAM, spectrogram, (floor, floor + _SPAN), "magma"),
        ("anomaly map, share of the score", MAP, map_, (0, strongest), "inferno"),
    ):
        _panel(draw, f"{title}, by frequency in Hz", panel, (0, config.n_mels), hertz)
        _paint(shown, (*ACROSS, *panel), values, ends, colours)
        bar = (ACROSS[1] + 24, ACROSS[1] + 36, *panel)
        _paint(shown, bar, np.linspace(*ends, 256)[:, None], ends, colours)
        _scale(draw, bar[1], panel, ends)

    curve = map_.sum(axis=0)
    lines = [(low, GREY, 2, "median of normals")]
    if conformal.threshold is not None:
        lines.append((conformal.threshold, VERMILLION, 6, "threshold"))
    levels = [curve.min(), curve.max(), *(level for level, *_ in lines)]
    margin = 0.05 * (max(levels) - min(levels)) or 1.0
    ends = min(levels) - margin, max(levels) + margin
    _panel(draw, "score over time, s", CURVE, ends)
    for second in _ticks(0, seconds, 10):
        x = _across((0, seconds), ACROSS)(second)
        draw.line([(x, CURVE[1]), (x, CURVE[1] + 4)], BLACK)
        draw.text((x, CURVE[1] + 7), f"{second:g}", BLACK, _font(), anchor="mt")
    at, beside = _across(ends, CURVE[::-1]), ACROSS[1]
    for level, colour, dash, name in reversed(lines):
        for x in range(*ACROSS, 2 * dash):
            draw.line([(x, at(level)), (x + dash - 1, at(level))], colour)
        draw.text((beside, CURVE[0] - 5), name, colour, _font(), anchor="rs")
        beside -= draw.textlength(name, _font()) + 16
    edges = np.linspace(*ACROSS, len(curve) + 1).repeat(2)[1:-1]
    draw.line(list(zip(edges.tolist(), at(curve).repeat(2).tolist(), strict=True)), BLUE, 2)
    return np.asarray(shown)


def _across(ends: tuple[float, float], pixels: tuple[int, int]) -> Callable:
    """From values between two ends to pixels between two others."""
    scale = (pixels[1] - pixels[0]) / (ends[1] - ends[0])
    return lambda value: pixels[0] + (value - ends[0]) * scale


def _paint(
    shown: Image.Image, box: tuple[int, int, int, int], values: np.ndarray,
    ends: tuple[float, float], colours: str,
) -> None:  # fmt: skip
    """Values (rows from below, columns) in a box (left, right, top, bottom); where several fall on
    a pixel it has the largest: what is short stays visible."""
    from matplotlib import colormaps
    from PIL import Image

    left, right, top, bottom = box
    for axis, pixels in ((0, bottom - top), (1, right - left)):
        starts = np.arange(pixels) * values.shape[axis] // pixels
        values = np.maximum.reduceat(values, starts, axis=axis)
    part = np.clip((values[::-1] - ends[0]) / (ends[1] - ends[0]), 0, 1)
    painted = colormaps[colours](part, bytes=True)[..., :3]
    shown.paste(Image.fromarray(np.ascontiguousarray(painted)), (left, top))


def _panel(
    draw: ImageDraw.ImageDraw, title: str, panel: tuple[int, int], ends: tuple[float, float],
    ticks: dict[str, float] | None = None,
) -> None:  # fmt: skip
    """Title, frame, and ticks on the left."""
    (left, right), (top, bottom) = ACROSS, panel
    draw.text((left, top - 5), title, BLACK, _font(), anchor="ls")
    draw.rectangle((left - 1, top - 1, right, bottom), outline=BLACK)
    _scale(draw, left, panel, ends, ticks, right=False)


def _scale(
    draw: ImageDraw.ImageDraw, edge: int, panel: tuple[int, int], ends: tuple[float, float],
    ticks: dict[str, float] | None = None, right: bool = True,
) -> None:  # fmt: skip
    """Ticks down the left or the right edge of a panel, each with its text and the value where it
    stands; None: round numbers between the ends."""
    at, side = _across(ends, panel[::-1]), 1 if right else -1
    if ticks is None:
        ticks = {f"{value:g}": value for value in _ticks(*ends, 5)}
    for text, value in ticks.items():
        draw.line([(edge, at(value)), (edge + side * 4, at(value))], BLACK)
        place = edge + side * 7, at(value)
        draw.text(place, text, BLACK, _font(), anchor="lm" if right else "rm")


def _hertz(frequencies: np.ndarray) -> dict[str, float]:
    """Of round frequencies, not too close, where they lie on an axis of bands: band b has the
    frequency ``frequencies[b]`` in its middle, at b + 1/2."""
    low, high = frequencies[[0, -1]]
    found = [digit * 10**e for e in range(6) for digit in (1, 2, 5)]
    found = [value for value in found if low <= value <= high]
    if len(found) < 3:
        found = _ticks(low, high, 5)
    places = np.interp(found, frequencies, np.arange(len(frequencies)) + 0.5)
    kept: dict[str, float] = {}
    above = np.inf
    for value, place in zip(found[::-1], places[::-1].tolist(), strict=True):
        if above - place >= len(frequencies) / 12:  # one line of text
            kept[f"{value:g}"] = above = place
    return kept


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [value for value in found if low <= value <= high]


@cache
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)


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
        "Each: the spectrogram, the share of every frequency band in the score over time "
        "(the mean over the windows at that time), and their sum. Colours of shares mean the same "
        "everywhere on this page, but where a clip's largest share is beyond their scale; those of "
        f"spectrograms go from a clip's loudest band down by {_SPAN} dB, or up by as much from "
        "silence. Of clips longer than "
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
            drawn = encode_png(clip_picture(self.detector, wave, self.evaluation.score.map[i]))
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
