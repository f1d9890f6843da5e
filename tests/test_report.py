from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import auc

import diffad_fast as daf
from diffad_fast.calibration import Calibration
from diffad_fast.data import demo
from diffad_fast.data.mvtec import mvtec_test
from diffad_fast.evaluation import evaluate, image_metrics
from diffad_fast.report import write_report
from diffad_fast.report.figures import colour_range, histogram, roc_curve
from diffad_fast.report.images import ImagePage, outline, overlay
from diffad_fast.scoring import Conformal


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    demo.write_data(
        folder / "tiles", folder / "null", texture="gravel", side=32, train=44, test=2, seed=0
    )
    odd = folder / "tiles" / "test" / "a<b>&c"
    (folder / "tiles" / "test" / "blob-low").rename(odd)
    (folder / "tiles" / "ground_truth" / "blob-low").rename(
        folder / "tiles" / "ground_truth" / odd.name
    )
    return folder / "tiles"


@pytest.fixture(scope="module")
def detector(root):
    fitted = daf.Detector(
        image_size=32, denoiser="unet-tiny", train_steps=3, reverse_steps=2, conformal_share=0.5,
        device="cpu",
    )  # fmt: skip
    return fitted.fit(root / "train" / "good")


@pytest.fixture(scope="module")
def evaluation(detector, root):
    return evaluate(detector, mvtec_test(root), strict=False)


class Page(HTMLParser):
    """Texts of the cells, sources of the images, and every tag that was opened."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.sources, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.sources.append(attributes["src"])
            assert attributes["alt"]
        elif tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        assert tag not in ("script", "link") and "href" not in attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def pictures(page):
    for source in page.sources:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            yield np.asarray(image)


# -------------------------------------------------------------------- pictures


def test_overlay_is_clear_below_low_and_full_above_high():
    rng = np.random.default_rng(0)
    image = rng.random((1, 20, 30)).astype(np.float32)
    plain = np.repeat(np.rint(image[0] * 255).astype(np.uint8)[..., None], 3, axis=2)
    value = rng.uniform(-5, 2, (20, 30)).astype(np.float32)
    picture = overlay(image, value, 2.0, 6.0)
    assert picture.shape == (20, 30, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, plain)

    value[:, :15] = 6
    value[0, 0] = 1e6
    picture = overlay(image, value, 2.0, 6.0)
    np.testing.assert_array_equal(picture[:, 15:], plain[:, 15:])
    # A quarter of the image and three quarters of the last colour of matplotlib's inferno.
    last = np.array([0.988362, 0.998364, 0.644924])
    expected = 255 * (0.25 * image[0, :, :15, None] + 0.75 * last)
    assert np.abs(picture[:, :15] - expected).max() <= 0.51


def test_overlay_hides_more_where_the_map_is_higher():
    images = [np.full((3, 1, 50), level, dtype=np.float32) for level in (0.0, 1.0)]
    ramp = np.linspace(0, 1, 50)[None]
    black, white = (overlay(image, ramp, 0.0, 1.0).astype(int) for image in images)
    contrast = (white - black)[0]  # what is left of the difference between two images
    assert (np.diff(contrast, axis=0) <= 0).all()
    assert (contrast[0] == 255).all() and (np.abs(contrast[-1] - 64) <= 1).all()


def test_outline_surrounds_the_mask_at_any_size():
    image = np.zeros((3, 16, 16), dtype=np.float32)
    mask = np.zeros((16, 16), dtype=bool)
    mask[5:8, 9:12] = True
    marked = (outline(image, mask) != 0).any(axis=-1)
    ring = np.zeros_like(mask)
    ring[4:9, 8:13] = True
    np.testing.assert_array_equal(marked, ring & ~mask)
    # One pixel of a mask that is ten times as large is still shown.
    large = np.zeros((160, 160), dtype=bool)
    large[73, 118] = True
    ys, xs = np.nonzero((outline(image, large) != 0).any(axis=-1))
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (6, 8, 10, 12)
    # Cells that the mask covers in part are inside.
    large[:] = False
    large[75:98, 42:55] = True
    ring[:] = False
    ring[6:11, 3:7] = True
    ring[7:10, 4:6] = False
    np.testing.assert_array_equal((outline(image, large) != 0).any(axis=-1), ring)
    assert not outline(image, None).any() and not outline(image, ~mask & mask).any()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # 39 scores at a rate of 5%: p <= 0.05 needs at most one as high, the second largest is 37.
        (np.arange(39.0), (19.0, 19.0 + 4 * (37.0 - 19.0))),
        (np.arange(11.0), (5.0, 5.0 + 4 * (10.0 - 5.0))),
        (np.array([3.0]), (3.0, 3.0 + 4 * 3.0)),
        (np.zeros(30), (0.0, 4.0)),
    ],
)
def test_colours_come_from_the_calibration(detector, scores, expected, monkeypatch):
    monkeypatch.setitem(
        detector.calibrations, detector.mode, Calibration([], Conformal(scores, None, 0.05))
    )
    assert colour_range(detector) == expected


# -------------------------------------------------------------------- page


def test_page_holds_figures_and_pictures(detector, evaluation, tmp_path):
    folder = tmp_path / "new" / "report"
    write_report(folder, detector, evaluation)
    assert [p.name for p in folder.iterdir()] == ["index.html"]
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert page.open == []
    width = 2 + len(ImagePage.figures)
    table = [page.cells[i : i + width] for i in range(0, len(page.cells), width)]
    assert [row[0] for row in table[1:]] == ["all", *sorted(evaluation.metrics["per_defect"])]
    assert "a<b>&c" in evaluation.metrics["per_defect"]
    for row in table[1:]:
        figures = evaluation.metrics["per_defect"].get(row[0], evaluation.metrics)
        assert row[1] == str(figures["n_anomalous"])
        assert row[2:] == [f"{figures[key]:.3f}" for key in ImagePage.figures]
    shown = list(pictures(page))
    # Two plots; six normals, six worst and six best defects, three pictures each.
    assert len(shown) == 2 + 3 * 18
    assert {p.shape for p in shown[2:]} == {(32, 32, 3)}
    worst = int(np.argmax(np.where(evaluation.label == 0, evaluation.score.score, -np.inf)))
    with Image.open(evaluation.images[worst].path) as image:
        np.testing.assert_array_equal(shown[2][..., 0], np.asarray(image))
    lowest = np.where(evaluation.label == 1, evaluation.score.score, np.inf).min()
    assert f"score {lowest:.3f}" in page.text
    labels = detector.conformal.label(evaluation.score.score)
    assert page.text.count("false alarm ") == 0  # a caption ends with its verdict
    alarms = sorted(evaluation.score.score[(evaluation.label == 0) & (labels == 1)])
    assert len(re.findall("· false alarm(?!s)", page.text)) == len(alarms)


def test_missing_figures_have_a_dash_and_the_reason(detector, root, tmp_path):
    (tmp_path / "set" / "test").mkdir(parents=True)
    (tmp_path / "set" / "test" / "good").symlink_to(root / "test" / "good")
    figures = evaluate(detector, mvtec_test(tmp_path / "set"), strict=False)
    write_report(tmp_path / "report", detector, figures)
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert page.cells.count("—") == 6  # all but the share of false alarms
    assert figures.metrics["undefined"]["image_auroc"] in page.text
    assert len(page.sources) == 1 + 3 * 6  # no ROC curve


def test_without_a_threshold(detector, evaluation, tmp_path, monkeypatch):
    few = Conformal(detector.conformal.scores[:5], None, 0.05)
    monkeypatch.setitem(detector.calibrations, detector.mode, Calibration([], few))
    score = dataclasses.replace(evaluation.score, label=None)
    metrics = {**image_metrics(evaluation.images, score), "latency_ms": 1.0}
    write_report(tmp_path, detector, dataclasses.replace(evaluation, metrics=metrics, score=score))
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert few.why_no_label() in page.text and "missed" not in page.text
    assert "way from there to the highest of these scores" in page.text


def test_roc_curve_and_operating_point(detector, evaluation):
    axes = roc_curve(evaluation, evaluation.metrics["image_auroc"]).axes[0]
    _, curve, point = axes.lines
    area = auc(curve.get_xdata(), curve.get_ydata())
    assert area == pytest.approx(evaluation.metrics["image_auroc"], abs=1e-12)
    above = evaluation.score.score > detector.conformal.threshold
    expected = [above[evaluation.label == value].mean() for value in (0, 1)]
    np.testing.assert_allclose(np.ravel(point.get_data()), expected)


def test_histogram_counts_every_image(detector, evaluation):
    axes = histogram(detector, evaluation).axes[0]
    bins = [np.diff(patch.get_xy()[:, 0]) for patch in axes.patches]
    assert len(bins) == 2
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[:2] == ["normal (6)", "anomalous (12)"]
    edges = axes.patches[0].get_xy()[:, 0]
    assert edges.min() < evaluation.score.score.min()
    assert edges.max() > evaluation.score.score.max()


# -------------------------------------------------------------------- files


def test_a_report_appears_whole_or_not_at_all(detector, evaluation, tmp_path, monkeypatch):
    write_report(tmp_path, detector, evaluation)
    before = (tmp_path / "index.html").read_bytes()

    def break_down(*args):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(ImagePage, "html", break_down)
    for folder in (tmp_path, tmp_path / "new" / "folder"):
        with pytest.raises(RuntimeError):
            write_report(folder, detector, evaluation)
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_bytes() == before
