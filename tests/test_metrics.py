from __future__ import annotations

import subprocess
import sys
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn.metrics import precision_recall_curve, roc_auc_score

from diffad_fast import metrics, native
from diffad_fast.errors import InputError
from diffad_fast.reference import metrics as in_numpy

needs_host = pytest.mark.skipif(native._host is None, reason="the native module is missing")


def aupro_by_definition(masks, maps, max_fpr):
    """MVTec AD, word by word: at every distinct score, look at every region."""
    regions = []
    for mask, scores in zip(masks, maps, strict=True):
        labels, number = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [scores[labels == i + 1] for i in range(number)]
    normal = np.concatenate([s[m == 0] for m, s in zip(masks, maps, strict=True)])
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([s.ravel() for s in maps]))[::-1]:
        overlap = np.mean([(region >= threshold).mean() for region in regions])
        points.append(((normal >= threshold).mean(), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        if x1 <= max_fpr:
            area += (x1 - x0) * (y0 + y1) / 2
        elif x0 < max_fpr:
            y = y0 + (y1 - y0) * (max_fpr - x0) / (x1 - x0)
            area += (max_fpr - x0) * (y0 + y) / 2
    return area / max_fpr


def f1_by_sklearn(labels, scores):
    precision, recall, _ = precision_recall_curve(labels, scores)
    total = precision + recall
    return (2 * precision * recall / np.where(total == 0, 1, total)).max()


def scene(seed, number=4, size=14, levels=6, density=0.12):
    """Masks with touching regions, maps with heavy ties that know something about the masks."""
    rng = np.random.default_rng(seed)
    masks = (rng.random((number, size, size)) < density).astype(np.uint8)
    masks[0] = 0
    maps = rng.integers(0, levels, masks.shape) + masks * rng.integers(0, 3, masks.shape)
    return masks, maps.astype(np.float32) / levels


BINARY = st.integers(2, 60).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.int64, n, elements=st.integers(0, 1)).filter(lambda a: 0 < a.sum() < a.size),
        hnp.arrays(np.float64, n, elements=st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 2.0, 1e9])),
    )
)


@settings(max_examples=80, deadline=None)
@given(BINARY, st.sampled_from([0.05, 0.1, 0.3, 0.5, 1.0]))
def test_scalars_equal_sklearn(data, max_fpr):
    labels, scores = data
    assert metrics.auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.pauc(labels, scores, max_fpr) == pytest.approx(
        roc_auc_score(labels, scores, max_fpr=max_fpr), abs=1e-12
    )
    assert metrics.f1_max(labels, scores) == pytest.approx(f1_by_sklearn(labels, scores), abs=1e-12)
    for value in (metrics.auroc, metrics.pauc, metrics.f1_max):
        assert 0.0 <= value(labels, scores) <= 1.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 6, 1000]), st.sampled_from([0.05, 0.3, 1.0]))
def test_aupro_equals_the_definition(seed, levels, max_fpr):
    masks, maps = scene(seed, number=3, size=9, levels=levels)
    masks[1, 2, 2] = masks[1, 3, 3] = 1  # touching at a corner: one region
    value = metrics.aupro(masks, maps, max_fpr)
    assert value == pytest.approx(aupro_by_definition(masks, maps, max_fpr), abs=1e-9)
    assert 0.0 <= value <= 1.0


def test_corners_join_regions():
    mask = np.zeros((1, 6, 6), bool)
    mask[0, 1, 1] = mask[0, 2, 2] = mask[0, 4, 5] = True
    scores = np.zeros((1, 6, 6))
    scores[0, 1, 1] = scores[0, 2, 2] = 1.0
    # Two regions, one found before any false positive; the other is tied with all normal pixels,
    # so the curve rises from 1/2 at FPR 0 to 1 at FPR 1. With three regions it would start at 2/3.
    assert metrics.aupro(masks=mask, maps=scores, max_fpr=1.0) == pytest.approx(0.75, abs=1e-12)


def test_pixel_metrics_agree_with_the_single_ones():
    masks, maps = scene(3, number=6, size=20)
    found = metrics.pixel_metrics(masks, maps)
    assert found["aupro"] == metrics.aupro(masks, maps)
    assert found["auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert found["f1_max"] == pytest.approx(f1_by_sklearn(masks.ravel(), maps.ravel()), abs=1e-12)


def test_images_that_are_all_background_or_all_foreground():
    masks, maps = scene(5)
    masks[1] = 1
    masks[2] = 0
    found = metrics.pixel_metrics(masks, maps)
    assert found["aupro"] == pytest.approx(aupro_by_definition(masks, maps, 0.3), abs=1e-9)
    assert found["auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)


def test_lists_of_images_of_any_size():
    rng = np.random.default_rng(0)
    shapes = [(5, 9), (12, 4), (7, 7)]
    masks = [rng.random(s) < 0.2 for s in shapes]
    maps = [rng.integers(0, 9, s) / 8 for s in shapes]
    flat = np.concatenate([m.ravel() for m in masks]), np.concatenate([m.ravel() for m in maps])
    assert metrics.auroc(masks, maps) == pytest.approx(roc_auc_score(*flat), abs=1e-12)
    assert metrics.f1_max(masks, maps) == pytest.approx(f1_by_sklearn(*flat), abs=1e-12)
    assert metrics.aupro(masks, maps) == pytest.approx(
        aupro_by_definition(masks, maps, 0.3), abs=1e-9
    )
    tensors = [torch.tensor(m) for m in masks], [torch.tensor(m) for m in maps]
    assert metrics.pixel_metrics(*tensors) == metrics.pixel_metrics(masks, maps)


def test_iterables_are_read_exactly_twice_one_image_at_a_time():
    masks, maps = scene(11)

    class Lazy:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return (torch.from_numpy(m) for m in maps)

    lazy = Lazy()
    assert metrics.pixel_metrics(masks, lazy) == metrics.pixel_metrics(masks, maps)
    assert lazy.passes == 2


def test_arrays_longer_than_a_block_give_the_same(monkeypatch):
    masks, maps = scene(2, number=5, size=30)
    whole = metrics.auroc(masks, maps), metrics.f1_max(masks, maps), metrics.pauc(masks, maps)
    monkeypatch.setattr(metrics, "_BLOCK", 97)
    assert whole == (
        metrics.auroc(masks, maps),
        metrics.f1_max(masks, maps),
        metrics.pauc(masks, maps),
    )
    assert whole[0] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_dtypes(dtype):
    scores = torch.tensor([0, 3, 1, 2, 2, 5]).to(dtype)
    labels = torch.tensor([False, True, False, False, True, True])
    assert metrics.auroc(labels, scores) == pytest.approx((9 - 0.5) / 9, abs=1e-12)


def test_labels_above_one_and_plain_lists():
    assert metrics.auroc([0, 255, 0, 1], [0.1, 0.9, 0.4, 0.3]) == pytest.approx(0.75)


def test_perfect_and_worst_scores():
    labels = np.array([0, 0, 1, 1])
    assert metrics.auroc(labels, labels) == 1.0
    assert metrics.pauc(labels, labels) == 1.0
    assert metrics.f1_max(labels, labels) == 1.0
    assert metrics.auroc(labels, -labels) == 0.0
    mask = np.eye(8)[None]
    assert metrics.aupro(mask, mask) == 1.0
    assert metrics.aupro(mask, -mask) == 0.0


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.pauc, metrics.f1_max, metrics.aupro])
@pytest.mark.parametrize("value, reason", [(0, "no label is > 0"), (1, "every label is > 0")])
def test_one_class_is_undefined(metric, value, reason):
    scores = np.random.default_rng(0).random((2, 4, 4))
    with pytest.raises(InputError, match=reason):
        metric(np.full(scores.shape, value), scores)


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.pauc, metrics.f1_max, metrics.aupro])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite(metric, bad):
    masks, maps = scene(1)
    maps[0, 0, 0] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        metric(masks, maps)


def test_shapes_must_agree():
    with pytest.raises(InputError, match=r"\(3,\).*\(4,\)"):
        metrics.auroc(np.zeros(3), np.zeros(4))
    with pytest.raises(InputError, match=r"\(2, 4, 4\).*\(2, 4, 5\)"):
        metrics.aupro(np.zeros((2, 4, 4)), np.zeros((2, 4, 5)))
    with pytest.raises(InputError, match=r"\(4, 4\).*\(4, 5\).*item 1"):
        metrics.aupro([np.ones((4, 4))] * 2, [np.ones((4, 4)), np.ones((4, 5))])
    with pytest.raises(InputError, match="scores go on after 1 items"):
        metrics.auroc([np.eye(2)], [np.eye(2), np.eye(2)])
    with pytest.raises(InputError, match=r"\(1, 4, 4\)"):
        metrics.aupro(np.ones((2, 1, 4, 4)), np.ones((2, 1, 4, 4)))


def test_other_bad_input():
    masks, maps = scene(1)
    with pytest.raises(InputError, match="read twice"):
        metrics.aupro(masks, (m for m in maps))
    with pytest.raises(InputError, match="dtype"):
        metrics.auroc([0, 1], ["a", "b"])
    with pytest.raises(InputError, match="labels hold NaN"):
        metrics.auroc([0.0, np.nan], [0.0, 1.0])
    for single in ({0: 0, 1: 1}, {0, 1}):
        with pytest.raises(InputError, match="single numbers in a (dict|set)"):
            metrics.auroc(single, single)
    masked = np.ma.array([0.1, 0.4], mask=[False, True])
    with pytest.raises(InputError, match="scores have masked values"):
        metrics.auroc([0, 1], masked)
    with pytest.raises(InputError, match="labels have masked values"):
        metrics.aupro([np.ma.masked_equal(m, 1) for m in masks], maps)
    for max_fpr in (0.0, 1.5, float("nan"), "a", "0.5", None):
        with pytest.raises(InputError, match="max_fpr"):
            metrics.aupro(masks, maps, max_fpr)
        with pytest.raises(InputError, match="max_fpr"):
            metrics.pauc(masks, maps, max_fpr)


def test_mixed_precisions_keep_the_finest():
    # 1 + 2^-30 is 1 in float32: the second image's normal score would be tied with the anomaly.
    masks = [np.array([[1, 0]]), np.array([[0, 0]])]
    maps = [np.array([[1, 0]], np.float32), np.array([[1 + 2**-30, 1 - 2**-30]])]
    for order in (slice(None), slice(None, None, -1)):
        assert metrics.auroc(masks[order], maps[order]) == pytest.approx(2 / 3, abs=1e-15)


@pytest.mark.parametrize("change", ["transposed", "strided", "big-endian", "read-only", "wide"])
def test_memory_layouts(change):
    masks, maps = scene(4)
    want = metrics.pixel_metrics(masks, maps)
    if change == "transposed":
        masks, maps = (np.asfortranarray(a) for a in (masks, maps))
    elif change == "strided":
        masks, maps = (np.repeat(a, 2, axis=2)[:, :, ::2] for a in (masks, maps))
    elif change == "big-endian":
        maps = maps.astype(">f4")
    elif change == "read-only":
        maps.flags.writeable = False
    else:
        masks, maps = masks.astype(np.int64), maps.astype(np.longdouble)
    assert metrics.pixel_metrics(masks, maps) == want


@needs_host
@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 23), st.integers(1, 23)),
    st.sampled_from([0.03, 0.3, 0.6, 0.97]),
    st.integers(0, 2**31),
    st.sampled_from([np.float32, np.float64]),
)
def test_regions_equal_scipys(shape, density, seed, dtype):
    rng = np.random.default_rng(seed)
    mask, scores = rng.random(shape) < density, rng.standard_normal(shape).astype(dtype)
    for regions in (True, False):
        got = native._host.anomalous_scores(mask, scores, regions)
        for a, b in zip(got, in_numpy.anomalous_scores(mask, scores, regions), strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.asarray(a).dtype == np.asarray(b).dtype


@needs_host
def test_winding_regions():
    """Rows whose runs belong to one region only by a long way round, and two nested spirals."""
    comb = np.zeros((9, 31), bool)
    comb[:, ::2] = True
    comb[-1] = True
    spiral = np.zeros((41, 41), bool)
    y, x, dy, dx, length = 0, 0, 0, 1, 40
    for turn in range(38):
        for _ in range(max(length, 1)):
            spiral[y, x] = True
            y, x = y + dy, x + dx
        dy, dx = dx, -dy
        length -= 2 if turn % 2 else 0
    for mask in (comb, comb[::-1], spiral, spiral.T, ~spiral, spiral[::-1, ::-1]):
        mask = np.ascontiguousarray(mask)
        scores = np.zeros(mask.shape, np.float32)
        _, sizes = native._host.anomalous_scores(mask, scores, True)
        _, want = in_numpy.anomalous_scores(mask, scores, True)
        np.testing.assert_array_equal(sizes, want)


def tricky_scores(kind, dtype, rng, n):
    """Distributions that a table over the bits, or over the values, would serve badly."""
    if kind == "ties":
        values = rng.integers(-3, 4, n) / 2
    elif kind == "zeros":
        values = rng.choice([-1.0, -0.0, 0.0, np.finfo(dtype).smallest_subnormal, 1.0], n)
    elif kind == "every magnitude":
        limits = np.log2([np.finfo(dtype).tiny, np.finfo(dtype).max])
        values = rng.choice([-1.0, 1.0], n) * 2 ** rng.uniform(*(0.999 * limits), n)
        values[: n // 20] = np.finfo(dtype).max
        values[n // 20 : n // 10] = -np.finfo(dtype).max
    elif kind == "a cluster and outliers":
        values = 1 + rng.integers(0, 4000, n) * np.finfo(dtype).eps
        values[: n // 50] = 1e30
        values[n // 50 : n // 25] = -1e30
    else:
        values = rng.standard_normal(n)
    return rng.permutation(values).astype(dtype)


@needs_host
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "kind", ["ties", "zeros", "every magnitude", "a cluster and outliers", "normal"]
)
@pytest.mark.parametrize("levels", [1, 40, 20_000])
def test_sorting_and_counting_equal_numpys(kind, dtype, levels):
    rng = np.random.default_rng(levels)
    found = tricky_scores(kind, dtype, rng, max(levels, 60))[:levels]
    sizes = rng.integers(1, 900, levels).astype(np.uint32)
    for given_sizes in (sizes, sizes[:0]):
        got = native._host.distinct_scores(found, given_sizes)
        want = in_numpy.distinct_scores(found, given_sizes)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    counters = [engine.NormalCounter(got[0], 1) for engine in (native._host, in_numpy)]
    for n in (0, 1, 7, 30_000):
        mask = rng.random(n) < 0.3
        scores = np.concatenate([tricky_scores(kind, dtype, rng, n), found])
        mask = np.concatenate([mask, rng.random(levels) < 0.5])
        for counter in counters:
            counter.add(mask, scores)
        np.testing.assert_array_equal(*(counter.bins() for counter in counters))
    bins = counters[0].bins()
    assert native._host.f1_max(bins, got[1]) == in_numpy.f1_max(bins, got[1])
    for gains in (got[1], rng.random(got[1].size)):
        for max_fpr in (0.01, 0.3, 1.0):
            assert native._host.curve_area(bins, gains, max_fpr) == pytest.approx(
                in_numpy.curve_area(bins, gains, max_fpr), abs=1e-13
            )


@needs_host
def test_counting_more_than_a_batch():
    rng = np.random.default_rng(0)
    levels = np.unique(rng.standard_normal(3000, dtype=np.float32))
    scores = rng.standard_normal((1 << 20) * 5 // 2, dtype=np.float32)
    mask = np.zeros(scores.shape, bool)
    mask[1000:2000] = True
    counters = [engine.NormalCounter(levels, 2) for engine in (native._host, in_numpy)]
    for counter in counters:
        counter.add(mask, scores)
    np.testing.assert_array_equal(*(counter.bins() for counter in counters))


@needs_host
@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize("kind", ["ties", "a cluster and outliers", "normal"])
@pytest.mark.parametrize("levels", [1, 5, 20_000])
def test_threads_count_the_same(levels, kind, threads):
    # 65,536 scores are worth a thread: seven have work, and bins that two of them have parts of.
    rng = np.random.default_rng(levels)
    found = np.unique(tricky_scores(kind, np.float32, rng, max(levels, 60))[:levels])
    scores = tricky_scores(kind, np.float32, rng, 500_000)
    mask = rng.random(scores.size) < 0.01
    counters = [
        native._host.NormalCounter(found, threads),
        native._host.NormalCounter(found, 1),
        in_numpy.NormalCounter(found, 1),
    ]
    for counter in counters:
        counter.add(mask, scores)
    assert counters[0].bins().sum() == (~mask).sum()
    for other in counters[1:]:
        np.testing.assert_array_equal(counters[0].bins(), other.bins())


@needs_host
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_finite(value, dtype):
    scores = np.full(37, np.finfo(dtype).max, dtype)
    assert native._host.all_finite(scores) and native._host.all_finite(-scores)
    for i in (0, 20, 36):
        bad = scores.copy()
        bad[i] = value
        assert not native._host.all_finite(bad)


def test_without_the_native_module(monkeypatch):
    masks, maps = scene(8, size=30, levels=50)
    want = metrics.pixel_metrics(masks, maps), metrics.pauc(masks, maps)
    monkeypatch.setattr(metrics, "_engine", in_numpy)
    got = metrics.pixel_metrics(masks, maps), metrics.pauc(masks, maps)
    assert got[0] == pytest.approx(want[0], abs=1e-14)
    assert got[1] == pytest.approx(want[1], abs=1e-14)


@needs_host
def test_the_native_module_guards_its_memory():
    host = native._host
    two, three = np.zeros(2, np.float32), np.zeros(3, np.float32)
    mask = np.zeros(2, bool)
    with pytest.raises(ValueError, match="differ in size"):
        host.anomalous_scores(mask, three, False)
    with pytest.raises(ValueError, match="two axes"):
        host.anomalous_scores(mask, two, True)
    with pytest.raises(ValueError, match="differ in size"):
        host.NormalCounter(three[:1], 1).add(mask, three)
    for function in (host.f1_max, lambda *given: host.curve_area(*given, 1.0)):
        with pytest.raises(ValueError, match="differ in size"):
            function(np.zeros(4, np.int64), np.ones(2, np.uint32))
    with pytest.raises(ValueError, match="differ in size"):
        host.distinct_scores(three, np.ones(2, np.uint32))
    for levels in (three, three[:0], np.float32([1, np.nan]), np.float32([1, 0])):
        with pytest.raises(ValueError, match="levels"):
            host.NormalCounter(levels, 1)
    with pytest.raises(ValueError, match="thread"):
        host.NormalCounter(three[:1], 0)
    with pytest.raises(TypeError):
        host.all_finite(np.zeros(2, np.int32))
    with pytest.raises(TypeError):
        host.all_finite(np.zeros(4, np.float32)[::2])


@pytest.mark.slow
def test_ten_thousand_maps_need_less_than_a_gibibyte():
    code = """
import resource
import numpy as np
from diffad_fast import metrics

rng = np.random.default_rng(0)
base = rng.standard_normal((8, 256, 256), dtype=np.float32)
regions = np.zeros((8, 256, 256), bool)
regions[:, 40:80, 100:149] = True  # 3%

class Stream:
    def __init__(self, image):
        self.image = image

    def __iter__(self):
        return map(self.image, range(10_000))

masks = Stream(lambda i: regions[i % 8])
maps = Stream(lambda i: base[i % 8] + regions[i % 8] + np.float32(1e-7 * i))
print(metrics.pixel_metrics(masks, maps))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1 << 20  # KiB


def test_lists_of_the_numbers_of_numpy_and_torch():
    label, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    for kind in (list, lambda x: list(torch.tensor(x)), deque):
        assert metrics.auroc(kind(label), kind(score)) == metrics.auroc(label, score)
    assert metrics.auroc(range(2), range(2)) == 1.0


def test_rates_of_numpy_and_torch():
    label, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    for rate in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        found = metrics.pauc(label, score, rate)
        assert type(found) is float and found == metrics.pauc(label, score, 0.5)
