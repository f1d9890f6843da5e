"""A complete run on real photographs without a download: ``python -m diffad_fast.data.demo``.

**Photographs.** The brick, gravel and grass textures that are part of the scikit-image package,
512x512 grey. One of them (``--texture``) is the normal material. Its left 352 columns give the
training images and its right 160 columns the test images: no pixel is in both. An image is a square
crop at a random place, 0.75 to 1.125 times as large as the image, resized, and mirrored left-right
at random. Training crops overlap each other, so the detector's held-out normals are less
independent than photographs of many objects would be: its p-values are optimistic, and more good
test images are called anomalous than its false-positive rate says. The demo prints how many.

**Defects.** Each is a soft shape a(y,x) in [0,1] and a strength. The shape's centre is at least 15%
of the side away from the border, which may cut the shape. With the image x and s the standard
deviation of the photograph:

- ``blob``: a smooth irregular spot, radius 5 to 9% of the side; x + strength * sign * s * a with a
  random sign, strength 2.5 (high) or 1.0 (low).
- ``scratch``: a bent line, 40 to 80% of the side long and 1.5 to 2.5% of it wide; the same equation
  and strengths.
- ``swap``: an irregular patch of radius 10 to 16% of the side, from one of the other two
  photographs, shifted and scaled to the mean and the deviation of the image, so that nothing but
  its texture is wrong; x + strength * a * (patch - x), strength 1.0 (high) or 0.4 (low).

The ground truth is a > 0.5. **Null controls** are made by the same generator with strength 0: the
image stays as it is, the mask says what would have been changed. They are a data set of their own,
because there is nothing to find in them: an AUROC far from 0.5 would show that the figures measure
something else than the defects.

One photograph is little to learn from: a few hundred training steps learn it, many more learn it by
heart, and then every unseen arrangement is an anomaly.

Everything is drawn from ``--seed``; the data set is written in the MVTec AD layout.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DiffadError, InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..detector import Detector
    from ..evaluation import Evaluation

TEXTURES = ("brick", "gravel", "grass")
TRAIN_COLUMNS = 352
STRENGTHS = {
    "blob": {"high": 2.5, "low": 1.0, "null": 0.0},
    "scratch": {"high": 2.5, "low": 1.0, "null": 0.0},
    "swap": {"high": 1.0, "low": 0.4, "null": 0.0},
}
"""Strength of each kind of defect at each contrast."""
SIZES = {"side": 128, "train": 1500, "test": 25}
"""Arguments of :func:`write_data` in the demo: a compromise between certainty and minutes."""


def photographs() -> dict[str, np.ndarray]:
    """The three textures, (512,512) float64 in [0,1]. Raises InputError without scikit-image."""
    try:
        from skimage import data
    except ModuleNotFoundError:
        raise InputError(
            "the demo takes its photographs from scikit-image, which is not installed: run "
            "`pip install scikit-image`"
        ) from None
    return {name: getattr(data, name)() / 255.0 for name in TEXTURES}


def blob_shape(rng: np.random.Generator, side: int, low: float, high: float) -> np.ndarray:
    """A spot with a wavy border: (side,side) float64 in [0,1], radius a share of the side."""
    y, x = np.mgrid[:side, :side] + 0.5
    radius = rng.uniform(low, high) * side
    cy, cx = rng.uniform(0.15 * side, 0.85 * side, size=2)
    angle = np.arctan2(y - cy, x - cx)
    border = sum(
        rng.uniform(0, 0.3 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3)
    )
    distance = np.hypot(y - cy, x - cx) - radius * (1 + border)
    return _soft(distance, side)


def scratch_shape(rng: np.random.Generator, side: int) -> np.ndarray:
    """A bent line of constant width: (side,side) float64 in [0,1]."""
    length, angle = rng.uniform(0.4, 0.8) * side, rng.uniform(0, np.pi)
    half = length / 2 * np.array([np.sin(angle), np.cos(angle)])
    centre = rng.uniform(0.15 * side, 0.85 * side, size=2)
    bend = rng.uniform(-0.25, 0.25) * length * np.array([half[1], -half[0]]) / (length / 2)
    t = np.linspace(0, 1, 4 * side)[:, None]
    # A quadratic Bezier curve, as points closer to each other than pixels.
    points = (
        (1 - t) ** 2 * (centre - half) + 2 * t * (1 - t) * (centre + bend) + t**2 * (centre + half)
    )
    pixels = np.stack(np.mgrid[:side, :side], axis=-1) + 0.5
    from scipy.spatial import cKDTree

    distance, _ = cKDTree(points).query(pixels)
    return _soft(distance - rng.uniform(0.0075, 0.0125) * side, side)


def _soft(distance: np.ndarray, side: int) -> np.ndarray:
    """1 inside (distance < 0), 0 outside, 0.5 on the border; the ramp is 1.5% of the side wide."""
    return np.clip(0.5 - distance / (0.015 * side), 0, 1)


def add_defect(
    rng: np.random.Generator,
    image: np.ndarray,
    kind: str,
    strength: float,
    deviation: float,
    others: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The image with one defect, and its mask; the module's documentation has the equations.

    image: (side,side) in [0,1]. others: photographs for ``swap``. ``deviation``: s. What is drawn
    from ``rng`` does not depend on ``strength``. Returns (side,side) float64 in [0,1], and bool.
    """
    side = len(image)
    if kind == "swap":
        shape = blob_shape(rng, side, 0.10, 0.16)
        patch = crop(rng, others[rng.integers(len(others))], side)
        change = (patch - patch.mean()) / patch.std() * image.std() + image.mean() - image
    elif kind == "scratch":
        shape, change = scratch_shape(rng, side), rng.choice([-1, 1]) * deviation
    else:
        shape, change = blob_shape(rng, side, 0.05, 0.09), rng.choice([-1, 1]) * deviation
    return np.clip(image + strength * shape * change, 0, 1), shape > 0.5


def crop(rng: np.random.Generator, photograph: np.ndarray, side: int) -> np.ndarray:
    """A random square of a photograph, resized to (side,side), mirrored half of the time."""
    from PIL import Image

    height, width = photograph.shape
    size = int(rng.uniform(0.75, 1.125) * side)
    y, x = rng.integers(height - size + 1), rng.integers(width - size + 1)
    square = Image.fromarray(photograph[y : y + size, x : x + size].astype(np.float32))
    resized = np.asarray(square.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float64)
    return resized[:, ::-1] if rng.integers(2) else resized


def write_data(
    folder: Path, null: Path, *, texture: str, side: int, train: int, test: int, seed: int
) -> None:
    """Write the data set and its null controls, two roots of the MVTec AD layout, in the place of
    what these two folders hold.

    train: number of training images. test: number of test images of each kind and contrast, and a
    third of the number of good ones; the null controls get good images of their own.
    """
    photos = photographs()
    photo = photos.pop(texture)
    others, deviation = list(photos.values()), float(photo.std())
    for root in (folder, null):
        shutil.rmtree(root, ignore_errors=True)
    left, right = photo[:, :TRAIN_COLUMNS], photo[:, TRAIN_COLUMNS:]

    def stream(*name) -> np.random.Generator:
        # A generator for every folder: a longer one changes no other.
        return np.random.default_rng([seed, *"/".join(map(str, name)).encode()])

    rng = stream("train")
    for i in range(train):
        _write(folder / "train" / "good" / f"{i:03}.png", crop(rng, left, side))
    for root in (folder, null):
        rng = stream(root is null, "good")
        for i in range(3 * test):
            _write(root / "test" / "good" / f"{i:03}.png", crop(rng, right, side))
    for kind, strengths in STRENGTHS.items():
        for contrast, strength in strengths.items():
            root, name = null if contrast == "null" else folder, f"{kind}-{contrast}"
            rng = stream(name)
            for i in range(test):
                image, mask = add_defect(
                    rng, crop(rng, right, side), kind, strength, deviation, others
                )
                _write(root / "test" / name / f"{i:03}.png", image)
                _write(root / "ground_truth" / name / f"{i:03}_mask.png", mask)


def _write(path: Path, picture: np.ndarray) -> None:
    """Write (H,W) in [0,1], or (H,W,3) uint8, as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    if picture.dtype != np.uint8:
        picture = np.rint(picture * 255.0).astype(np.uint8)
    Image.fromarray(picture).save(path)


def figures(metrics: dict, null: dict) -> list[dict]:
    """A row for each kind and contrast: its AUROCs, AUPRO and the share that was found."""
    rows = []
    for kind, strengths in STRENGTHS.items():
        for contrast in strengths:
            source = null if contrast == "null" else metrics
            part = source["per_defect"][f"{kind}-{contrast}"]
            names = ("image_auroc", "pixel_auroc", "aupro", "true_positive_rate")
            rows.append({"kind": kind, "contrast": contrast, **{k: part[k] for k in names}})
    return rows


def overview(detector: Detector, evaluations: Sequence[Evaluation]) -> Figure:
    """A picture with a row a folder of test images: image, reconstruction, heatmap, ground truth.

    Each row shows the image with the median score of its folder: a typical one.
    """
    from ..report.figures import colour_range, new_figure
    from ..report.images import outline, overlay
    from .image_files import read_mask

    # Good images stand in both sets; those of the first are shown.
    members: dict[str, tuple[Evaluation, list[int]]] = {}
    for evaluation in reversed(evaluations):
        for name in {test.defect for test in evaluation.images}:
            rows = [i for i, test in enumerate(evaluation.images) if test.defect == name]
            members[name] = evaluation, rows
    names = [f"{kind}-{contrast}" for kind, all_ in STRENGTHS.items() for contrast in all_]
    names.append("good")
    columns = ("image", "reconstruction", "anomaly map", "ground truth")
    figure = new_figure((6.6, 1.62 * len(names)))
    axes = figure.subplots(len(names), len(columns))
    for cells, name in zip(axes, names, strict=True):
        evaluation, rows = members[name]
        typical = sorted(rows, key=lambda i: evaluation.score.score[i])[len(rows) // 2]
        test = evaluation.images[typical]
        image = next(iter(detector.open([test.path]).batches(1))).x
        mask = None if test.mask_path is None else read_mask(test.mask_path, test.path)
        pictures = (
            outline(image[0].numpy(), None),
            outline(detector.reconstruct(image)[0].numpy(), None),
            overlay(image[0].numpy(), evaluation.score.map[typical], *colour_range(detector)),
            outline(image[0].numpy(), mask),
        )
        for cell, picture, column in zip(cells, pictures, columns, strict=True):
            cell.imshow(picture)
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
            if name == names[0]:
                cell.set_title(column, fontsize=10)
        p_value = evaluation.score.p_value[typical]
        cells[0].set_ylabel(f"{name}\np = {p_value:.3f}", fontsize=9)
    return figure


def run(
    out: Path, *, texture: str = "brick", seed: int = 0, steps: int = 300, device: str | None = None
) -> dict:
    """The whole demo: data, training, evaluation, report, below the folder ``out``.

    Returns what is written as figures.json. Raises InputError where ``out`` cannot be written or
    scikit-image is missing.
    """
    from ..detector import Detector
    from ..evaluation import evaluate
    from ..files import check_result_folder
    from ..report import write_report
    from .mvtec import mvtec_test

    began = time.perf_counter()
    check_result_folder(out)
    detector = Detector(
        image_size=SIZES["side"], channels=1, preset="fast", denoiser="unet-tiny",
        train_steps=steps, validation_share=0.02, statistics_share=0.05, conformal_share=0.05,
        seed=seed, device=device,
    )  # fmt: skip
    data, null = out / "data", out / "null"
    write_data(data, null, texture=texture, seed=seed, **SIZES)
    detector.fit(data / "train" / "good")
    detector.save(out / "model.diffad")
    evaluations = [evaluate(detector, mvtec_test(root), strict=False) for root in (data, null)]
    write_report(out / "report", detector, evaluations[0])
    overview(detector, evaluations).savefig(out / "overview.png", dpi=110)
    metrics, null_metrics = (evaluation.metrics for evaluation in evaluations)
    result = {
        "texture": texture,
        "seed": seed,
        "train_steps": steps,
        "train_seconds": round(detector.history.seconds, 1),
        "latency_ms": round(metrics["latency_ms"], 2),
        "overall": {key: metrics[key] for key in metrics if key not in ("per_defect", "undefined")},
        "null": {
            key: null_metrics[key] for key in ("image_auroc", "pixel_auroc", "false_positive_rate")
        },
        "by_kind": figures(metrics, null_metrics),
        "seconds": round(time.perf_counter() - began, 1),
    }
    (out / "figures.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def table(result: dict) -> str:
    """The figures as text, a line for each kind and contrast."""
    lines = [("kind", "contrast", "image AUROC", "pixel AUROC", "AUPRO", "found")]
    rows = [*result["by_kind"], {"kind": "all", "contrast": "but null", **result["overall"]}]
    for row in rows:
        values = [row[key] for key in ("image_auroc", "pixel_auroc", "aupro", "true_positive_rate")]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        lines.append((row["kind"], row["contrast"], *cells))
    return "\n".join(
        f"{line[0]:8}  {line[1]:8}" + "".join(f"  {cell:>11}" for cell in line[2:])
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m diffad_fast.data.demo")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder (%(default)s)")
    parser.add_argument("--texture", choices=TEXTURES, default="brick", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (%(default)s)")
    parser.add_argument("--device", help="cpu or cuda; default: the best there is")
    args = parser.parse_args(argv)
    try:
        result = run(
            args.out, texture=args.texture, seed=args.seed, steps=args.steps, device=args.device
        )
    except (DiffadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(table(result))
    null = result["null"]["image_auroc"]
    print(f"null controls against good images: image AUROC {null:.3f}; by chance it is 0.5")
    rate = result["overall"]["false_positive_rate"]
    if rate is not None:
        print(f"false alarms among good images: {rate:.1%}")
    print(f"{result['seconds']} s in all; see {args.out}/report/index.html, overview.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
