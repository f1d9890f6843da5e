"""The metrics, on NumPy arrays, against what evaluation scripts usually call."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

from .. import peers
from ..case import ONE_THREAD, OURS, Case, Contender

THRESHOLDS = 200
BY_NORMALS = "NumPy, normals sorted alone"
LARGEST = 100  # maps that the slow ones are given


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    from diffad_fast import metrics

    n, side = (16, 256) if quick else (64, 256)
    sklearn = peers.get("sklearn.metrics")
    for name, ours, by_numpy, by_sklearn in (
        ("auroc", metrics.auroc, _auroc_by_normals, lambda y, s: sklearn.roc_auc_score(y, s)),
        ("pauc", metrics.pauc, _pauc_by_normals,
         lambda y, s: sklearn.roc_auc_score(y, s, max_fpr=0.1)),
        ("f1_max", metrics.f1_max, _f1_by_normals, lambda y, s: _f1_from_curve(sklearn, y, s)),
    ):  # fmt: skip
        contenders = {OURS: Contender(ours), BY_NORMALS: Contender(by_numpy, note=ONE_THREAD)}
        if sklearn:
            contenders["scikit-learn"] = Contender(by_sklearn, note=ONE_THREAD)
        yield _case(name, n, side, _pixels, _EXACT[name], contenders)
    for n in (100,) if quick else (100, 1000):
        yield _aupro_case(n, side)


def _aupro_case(n: int, side: int) -> Case:
    from diffad_fast import metrics

    contenders = {OURS: Contender(metrics.aupro)}
    if n <= LARGEST:
        contenders[BY_NORMALS] = Contender(_aupro_by_normals, note=ONE_THREAD)
        contenders["sort of all pixels"] = Contender(_aupro_by_sort, note=ONE_THREAD)
    others = {f"{THRESHOLDS} thresholds": (_aupro_by_thresholds, f", {ONE_THREAD}")}
    if anomalib := peers.get("anomalib.metrics"):
        others["anomalib"] = (lambda *pair: _aupro_by_anomalib(anomalib, *pair)), ""
    # Both go through all pixels once for every threshold: their time is as the number of maps.
    part = min(1.0, LARGEST / n)
    scaled = f", on {LARGEST} maps, its time times {n / LARGEST:g}" if part < 1 else ""
    for name, (run, threads) in others.items():
        contenders[name] = Contender(
            lambda masks, maps, run=run: run(masks[:LARGEST], maps[:LARGEST]),
            tolerance=0.02,
            part=part,
            note=f"approximate{scaled}{threads}",
        )
    return _case("aupro", n, side, _data, _aupro_by_sort, contenders)


def _case(name, n, side, data, exact, contenders) -> Case:
    return Case(
        f"metrics.{name}",
        f"{n} maps of {side}×{side}, 1% anomalous",
        lambda device: data(n, side),
        lambda given: exact(given[0], given[1].astype(np.float64)),
        contenders,
        bytes=5 * n * side**2,  # a bool and a float32 a pixel
        tolerance=1e-9,
        batch=n,
        unit="map",
        host=True,
    )


def _data(n: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks (bool) with three discs an image, about 1% of it; scores (float32) higher there."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    masks = np.zeros((n, side, side), dtype=bool)
    for mask in masks:
        for cy, cx in rng.uniform(0, side, size=(3, 2)):
            mask |= np.hypot(y - cy, x - cx) < side * 0.033
    maps = rng.standard_normal(masks.shape, dtype=np.float32) + 1.5 * masks
    return masks, maps.astype(np.float32)


def _pixels(n: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    masks, maps = _data(n, side)
    return masks.reshape(-1), maps.reshape(-1)


# ------------------------------------------------------------ exact values, from all scores sorted


def _curve(labels, scores):
    """True and false positives at each distinct threshold, from the highest."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), scores.size - 1)
    true = np.cumsum(labels[order])[ends].astype(np.float64)
    return true, ends + 1 - true


def _auroc(labels, scores):
    true, false = (np.append(0, part) for part in _curve(labels, scores))
    return _area(true / true[-1], false / false[-1])


def _pauc(labels, scores, limit=0.1):
    true, false = (np.append(0, part) for part in _curve(labels, scores))
    area = _area_to(false / false[-1], true / true[-1], limit)
    return _standardised(area, limit)


def _standardised(area, limit):
    """McClish's: 0.5 by chance, 1 at best."""
    return (1 + (area - limit**2 / 2) / (limit - limit**2 / 2)) / 2


def _f1_max(labels, scores):
    true, false = _curve(labels, scores)
    return (2 * true / (true + false + true[-1])).max()


def _area(y, x):
    return 0.5 * np.dot(np.diff(x), y[1:] + y[:-1])


def _area_to(x, y, limit):
    inside = x <= limit
    x_end, y_end = np.append(x[inside], limit), np.append(y[inside], np.interp(limit, x, y))
    return _area(y_end, x_end)


_EXACT = {"auroc": _auroc, "pauc": _pauc, "f1_max": _f1_max}


def _regions(mask):
    from scipy import ndimage

    return ndimage.label(mask, structure=np.ones((3, 3)))


def _aupro_by_sort(masks, maps, limit=0.3):
    """Every pixel sorted once; a pixel of a region adds 1 / (its size × the number of regions)."""
    share, number = np.zeros(masks.shape), 0
    for out, mask in zip(share, masks, strict=True):
        labelled, count = _regions(mask)
        out[mask] = 1 / np.bincount(labelled[mask])[labelled[mask]]
        number += count
    order = np.argsort(-maps.reshape(-1), kind="stable")
    ends = np.append(np.flatnonzero(np.diff(maps.reshape(-1)[order])), maps.size - 1)
    overlap = np.cumsum(share.reshape(-1)[order] / number)[ends]
    false = np.cumsum(~masks.reshape(-1)[order])[ends]
    return _area_to(np.append(0, false / false[-1]), np.append(0, overlap), limit) / limit


# ---------------------------------------- in a few lines of NumPy, where anomalous pixels are few


def _area_by_normals(scores, weights, normal, limit):
    """Area to ``limit`` under what the anomalous pixels weigh together that are found, over the
    share of normal ones found: each adds its weight from where it is found on, and in the middle of
    normal ones with the same score."""
    normal = np.sort(normal)
    above = 1 - np.searchsorted(normal, scores, "right") / len(normal)
    reached = 1 - np.searchsorted(normal, scores, "left") / len(normal)
    tied = (reached - above).clip(min=1 / len(normal))
    cut = np.clip(limit - above, 0, None) ** 2 / (2 * tied)
    return np.dot(weights, np.where(reached > limit, cut, limit - (above + reached) / 2))


def _auroc_by_normals(labels, scores, limit=1.0):
    anomalous = np.sort(scores[labels])
    weights = np.full(len(anomalous), 1 / len(anomalous))
    return _area_by_normals(anomalous, weights, scores[~labels], limit)


def _pauc_by_normals(labels, scores, limit=0.1):
    return _standardised(_auroc_by_normals(labels, scores, limit), limit)


def _f1_by_normals(labels, scores):
    anomalous, normal = np.sort(scores[labels]), np.sort(scores[~labels])
    true = len(anomalous) - np.searchsorted(anomalous, anomalous, "left")
    false = len(normal) - np.searchsorted(normal, anomalous, "left")
    return (2 * true / (true + false + len(anomalous))).max()


def _aupro_by_normals(masks, maps, limit=0.3):
    scores, weights, number = [], [], 0
    for mask, map_ in zip(masks, maps, strict=True):
        labelled, count = _regions(mask)
        labelled = labelled[mask]
        scores.append(map_[mask])
        weights.append(1 / np.bincount(labelled)[labelled])
        number += count
    scores, weights = np.concatenate(scores), np.concatenate(weights) / number
    order = np.argsort(scores)
    return _area_by_normals(scores[order], weights[order], maps[~masks], limit) / limit


# ------------------------------------------------------------------------ as others compute them


def _f1_from_curve(sklearn, labels, scores):
    precision, recall, _ = sklearn.precision_recall_curve(labels, scores)
    return (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()


def _aupro_by_thresholds(masks, maps, limit=0.3):
    """The loop of common evaluation scripts: 200 thresholds between the extremes."""
    regions = []
    for i, mask in enumerate(masks):
        labelled, count = _regions(mask)
        regions += [(i, labelled == k) for k in range(1, count + 1)]
    normal = ~masks
    points = []
    for threshold in np.linspace(maps.max(), maps.min(), THRESHOLDS):
        found = maps >= threshold
        overlap = np.mean([found[i][region].mean() for i, region in regions])
        points.append((found[normal].mean(), overlap))
    x, y = np.array([(0.0, 0.0), *points]).T
    return _area_to(x, y, limit) / limit


def _aupro_by_anomalib(anomalib, masks, maps):
    import torch

    metric = anomalib.AUPRO(fields=["anomaly_map", "gt_mask"])
    batch = {"anomaly_map": torch.from_numpy(maps), "gt_mask": torch.from_numpy(masks).int()}
    metric.update(SimpleNamespace(**batch))
    return float(metric.compute())
