"""What scores look like: heatmaps, pictures of clips, tables of figures, and one HTML page that
holds everything."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..data.image_files import encode_png
from ..files import result_folder
from .audio import ClipPage, clip_picture
from .figures import colour_range
from .images import ImagePage, overlay

if TYPE_CHECKING:
    from ..detector import Detector
    from ..evaluation import AudioEvaluation, Evaluation

PAGES = {"image": ImagePage, "audio": ClipPage}


def write_report(
    folder: str | os.PathLike, detector: Detector, evaluation: Evaluation | AudioEvaluation
) -> None:
    """Write ``folder``/index.html: figures, ROC curve, histogram of scores, worst and best cases.

    The page holds its pictures and sounds itself and needs no other file. Raises InputError where
    ``folder`` cannot be written; a page that is there stays whole until it is replaced.
    """
    with result_folder(folder) as staged:
        text = PAGES[detector.config.kind](detector, evaluation).html()
        (staged / "index.html").write_text(text, encoding="utf-8", errors="replace")


def drawing(detector: Detector) -> Callable[[np.ndarray, np.ndarray], bytes]:
    """Of a sample, as it was scored, and its map the picture, as the bytes of a PNG file."""
    if detector.config.kind == "audio":
        return lambda wave, map_: encode_png(clip_picture(detector, wave, map_))
    low, high = colour_range(detector)
    return lambda image, map_: encode_png(overlay(image, map_, low, high))
