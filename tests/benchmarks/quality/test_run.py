"""Variants, hidden anomalies and parts of the quality suite."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.quality import run as quality
from benchmarks.quality import tables as quality_tables
from benchmarks.quality.data import DataSet


def test_a_variant_of_the_score_is_what_a_fit_with_it_gives():
    """Without another training, and it leaves no trace."""
    images = np.random.default_rng(0).random((26, 1, 32, 32), dtype=np.float32)
    data = DataSet("noise", "image", images[:20], images[20:], np.zeros(6), np.zeros(6))
    options = {"denoiser": "unet-tiny", "train_steps": 2}
    args = SimpleNamespace(preset="balanced", options=options, size=32, channels=1, device="cpu")
    detector, _ = quality._fit(data, args, 0, {})
    usual = detector.score(data.test).score
    for scoring in ({"map_weights": [1, 0, 1]}, {"mode": "invert", "inversion_steps": 2}):
        expected = quality._fit(data, args, 0, scoring)[0].score(data.test)
        with quality._scored_by(detector, data, scoring):
            found = detector.score(data.test)
        assert np.array_equal(found.score, expected.score)
        assert np.array_equal(found.p_value, expected.p_value)
        assert not np.allclose(found.score, usual)
    with quality._scored_by(detector, data, {"multi_scale": False}):
        assert not np.allclose(detector.score(data.test).score, usual)
        assert len(detector.model._features(torch.zeros(1, 4, 16, 16))) == 1
    assert np.array_equal(detector.score(data.test).score, usual)


def test_a_table_without_the_semantic_distance_trains_no_more(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((140, 3)).astype(np.float32)
    # So many that eight give the statistics: of fewer, maps lend each other their deviations.
    data = DataSet("rows", "vector", rows[:120], rows[120:], np.arange(20) % 2, np.full(20, "dev"))
    without = {"semantic_weight": 0}
    args = SimpleNamespace(
        preset="fast", options={"train_steps": 2}, device="cpu", robustness=False,
        variant=[("without", without)],
    )  # fmt: skip
    detector, seconds = quality._fit(data, args, 0, {})
    expected = quality._fit(data, args, 0, without)[0].score(data.test).score
    results = quality._Results(data, "dev")
    monkeypatch.setattr(quality, "_fit", None)
    quality._variants(results, detector, seconds, args, 0)
    (found,) = results.scores["without"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, detector.score(data.test).score, atol=1e-2)
    # Another weight may be of what the preset's detector has not fitted.
    assert not quality._shares_training("semantic_weight", 0.5)


def test_what_was_hidden_in_the_training_is_no_test(monkeypatch):
    # 60 training images and 60 test images of 20 objects, each of the value of its row; the test's
    # labels go round, so that an object has both kinds.
    train, test = -1 - np.arange(60.0), np.arange(60.0)
    data = DataSet(
        "values", "image", train, test, np.arange(60) % 2, np.zeros(60),
        groups=[n // 3 for n in range(60)], test_groups=[n // 3 for n in range(60)],
    )  # fmt: skip
    rows, scored, fitted = np.arange(9, 60), [], []

    def scorer(sign):
        def score(images, maps):
            scored.append(images.astype(int))
            # All anomalies in front of all normal ones, or behind.
            return SimpleNamespace(score=sign * (images % 2))

        def open_(source):
            return SimpleNamespace(batches=lambda n: [SimpleNamespace(x=torch.as_tensor(source))])

        return SimpleNamespace(score=score, open=open_)

    def fit(data, args, seed, options, polluted, groups):
        fitted.append((polluted, groups))
        return scorer(-1), 0.0

    monkeypatch.setattr(quality, "_fit", fit)
    found = quality._polluted(scorer(1), data, None, 0, rows)
    assert found == {f"{share}% hidden anomalies": -1.0 for share in (2, 5, 10)}
    for (polluted, groups), kept, count in zip(fitted, scored[::2], (1, 3, 6), strict=True):
        hidden = polluted[60:].astype(int)
        assert len(hidden) == count and (hidden % 2 == 1).all()
        assert polluted[:60].tolist() == train.tolist() and groups[:60] == data.groups
        # One group an object, none of which is one of the training's.
        objects = hidden // 3
        assert [groups[60:].index(name) for name in groups[60:]] == [
            objects.tolist().index(n) for n in objects
        ]
        assert not set(groups[60:]) & set(data.groups)
        assert kept.tolist() == [row for row in rows if row // 3 not in objects]
    assert [part.tolist() for part in scored[::2]] == [part.tolist() for part in scored[1::2]]
    # Where nothing is known of objects each is one.
    monkeypatch.setattr(quality, "_array", lambda detector, source: source)
    alone = DataSet("rows", "vector", train, test, data.label, data.part)
    scored.clear()
    quality._polluted(scorer(1), alone, None, 0, rows)
    polluted, groups = fitted[-1]
    assert groups is None and scored[-1].tolist() == [r for r in rows if r not in polluted[60:]]


def test_objects_in_both_parts_are_counted_and_told():
    part = np.array(["dev", "report", "dev", "report", "dev", "report"])
    data = DataSet("tiles", "image", None, None, np.zeros(6), part, test_groups=[0, 0, 0, 1, 2, 2])
    rows = np.flatnonzero(part == "report")
    assert quality._in_both(data, rows) == 2 and quality._in_both(data, np.arange(6)) == 0
    assert quality._in_both(DataSet("t", "vector", None, None, part, part), rows) == 0
    one = {"name": "tiles", "n_objects": 3}
    assert not quality_tables._both_parts(one)
    text = quality_tables._both_parts({**one, "n_objects_in_both_parts": 2})
    assert "2 of the 3 objects of this part stand in the other one too" in text
