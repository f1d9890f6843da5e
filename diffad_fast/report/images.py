"""Pictures of images: heatmaps, outlines of the ground truth, and the page of an evaluation.

The colours of a heatmap mean the same on every image of one detector (:func:`colour_range`), so a
normal image looks calm and two images can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..data.image_files import encode_png, read_mask
from ..scoring import own_part
from .figures import colour_range
from .page import Page, picture
from .tables import Table, cells

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
    drawn = _bytes(_rgb(image))
    if mask is not None:
        marked = torch.from_numpy(np.asarray(mask, dtype=np.float32))[None, None]
        # The maximum keeps regions that are smaller than a pixel of the picture.
        marked = torch.nn.functional.adaptive_max_pool2d(marked, drawn.shape[:2])
        grown = torch.nn.functional.max_pool2d(marked, 3, stride=1, padding=1)
        drawn[(grown - marked)[0, 0].numpy() > 0] = _OUTLINE
    return drawn


class ImagePage(Page):
    """The page of an ``Evaluation``."""

    unit, one, anomaly, anomalous = "image", "an image", "a defect", "defective"
    auroc = "image_auroc"
    figures = {
        "image_auroc": "image AUROC",
        "pixel_auroc": "pixel AUROC",
        "aupro": "AUPRO",
        "f1_max": "F1-max",
        "pixel_f1_max": "pixel F1-max",
        "true_positive_rate": "found",
        "false_positive_rate": "false alarms",
    }
    style = """
.cases { grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); }
figure img { width: 33%; }
"""
    heading = "Cases"
    figures_note = (
        "A row for a defect compares its images with all normal ones. "
        "AUPRO to a false-positive rate of 0.3; found and false alarms: shares of the defective "
        "and of the normal images that score above the detector's own threshold."
    )

    @property
    def note(self) -> str:
        end = "threshold" if self.detector.threshold is not None else "highest of these scores"
        return (
            "Each: the image, the anomaly map on it, the outline of the ground truth. The colours "
            "of the map mean the same everywhere on this page: none up to the median score of "
            f"held-out normal images, the strongest at four times the way from there to the {end}."
        )

    def shape(self) -> str:
        height, width = self.detector.config.image_size
        return f"{height}×{width} pixels, {self.detector.config.channels} channel(s)"

    @staticmethod
    def tables(metrics: dict) -> Iterator[Table]:
        """One of ``Detector.evaluate``: a row for all images, then one for each defect."""
        rows = [("all", metrics), *metrics["per_defect"].items()]
        yield Table(
            ["defect", "images", *ImagePage.figures.values()],
            [[name, str(row["n_anomalous"]), *cells(row, ImagePage.figures)] for name, row in rows],
        )

    def cases(self, rows: Sequence[int]) -> Iterator[str]:
        score, low_high = self.evaluation.score, colour_range(self.detector)
        tests = [self.evaluation.images[i] for i in rows]
        opened = self.detector.open([test.path for test in tests], strict=True)
        for i, test, batch in zip(rows, tests, opened.batches(1), strict=True):
            image = batch.x[0].numpy()
            mask = None if test.mask_path is None else read_mask(test.mask_path, test.path)
            drawn = (
                (outline(image, None), "image"),
                (overlay(image, own_part(score.map[i]), *low_high), "anomaly map"),
                (outline(image, mask), "ground truth"),
            )
            pictures = "\n".join(picture(encode_png(array), name) for array, name in drawn)
            yield (
                f"<figure><div>\n{pictures}\n</div>"
                f"{self.caption(i, test.defect, test.path)}</figure>"
            )


def _rgb(image: np.ndarray) -> np.ndarray:
    """(C,H,W) to (H,W,3)."""
    image = np.asarray(image, dtype=np.float32)
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


def _bytes(picture: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
