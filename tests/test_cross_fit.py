"""Calibration by models that have not seen a part each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import diffad_fast as daf
from diffad_fast.errors import InputError
from diffad_fast.models import TokenModel
from diffad_fast.scoring import cross_splits, fit_statistics

OPTIONS = {"train_steps": 20, "token_width": 32, "token_blocks": 1, "token_batch": 64}
IMAGES = {**OPTIONS, "image_size": 32, "tokens": ("cell-8",)}


def normals(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32)


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(0).random((n, 32, 32)).astype(np.float32)


def fitted(x=None, **options) -> daf.Detector:
    x = normals(30) if x is None else x
    groups = options.pop("groups", None)
    return daf.Detector(kind="vector", **{**OPTIONS, **options}).fit(x, groups=groups)


@pytest.mark.parametrize("folds", [2, 5, 99])
@pytest.mark.parametrize("sizes", [[1] * 40, [79, 22, 11, 7, 1], [3] * 12])
def test_splits_hold_every_group_out_once(sizes, folds):
    groups = [f"g{name}" for name, size in enumerate(sizes) for _ in range(size)]
    indices = list(range(0, 2 * len(groups), 2))  # every other sample is unusable
    groups = [group for group in groups for _ in range(2)]
    splits = cross_splits(indices, groups, folds, seed=3)
    assert len(splits) == min(folds, len(sizes))
    assert sorted(i for s in splits for i in s.conformal) == indices
    number = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    for split in splits:
        assert split.conformal_groups == [number[groups[i]] for i in split.conformal]
    for split in splits:
        assert split.statistics == split.conformal and split.validation == []
        assert sorted(split.fit + split.conformal) == indices
        assert not {groups[i] for i in split.fit} & {groups[i] for i in split.conformal}
    # No fold is larger than another by more than a group.
    lengths = [len(s.conformal) for s in splits]
    assert max(lengths) - min(lengths) <= max(sizes)
    assert cross_splits(indices, groups, folds, seed=3) == splits


def test_large_groups_are_spread_over_the_folds():
    groups = list("aaaaaabbbcccde")
    assert [len(s.conformal) for s in cross_splits(range(14), groups, 2, seed=0)] == [7, 7]


def test_the_model_sees_all_normals_and_folds_change_statistics_alone():
    a, b = fitted(cross_fit=2), fitted(cross_fit=6)
    for x, y in zip(a.model.state().values(), b.model.state().values(), strict=True):
        assert torch.equal(x, y)
    assert len(a.parts) == 2 and len(b.parts) == 6
    # Other statistics are other units: the order of samples stays but for the maps' weights.
    x = normals(50, seed=1)
    assert np.corrcoef(a.score(x).score, b.score(x).score)[0, 1] > 0.999


@pytest.mark.parametrize("mode", ["one_step", "invert", "reconstruct"])
def test_statistics_and_scores_are_those_of_models_that_have_not_seen_the_samples(mode):
    """Each fold's model by a detector of its own that is trained on the other folds alone."""
    x = normals(30)
    detector = fitted(x, cross_fit=3)
    detector.mode = mode
    maps, others = [], []
    for _, split in detector.parts:
        other = daf.Detector(kind="vector", **OPTIONS, mode=mode, semantic_weight=1.0)
        samples = other.open(x[split.fit])
        everything = list(range(len(split.fit)))
        other.model.learn(samples, split._replace(fit=everything, validation=[]), None)
        with torch.inference_mode():
            own = other.model.raw_maps(torch.from_numpy(x[split.conformal]))
        maps.append((own, split.statistics_groups))
        others.append((other, split))
    expected = fit_statistics(iter(maps), "scalar", 0.0)
    for found, wanted in zip(detector.statistics, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    scores = []
    for other, split in others:
        other.model.use(detector.statistics)
        scores.append(other.score_batch(torch.from_numpy(x[split.conformal]))[1])
    np.testing.assert_allclose(
        detector.conformal.scores, np.sort(np.concatenate(scores)), rtol=1e-6, atol=1e-6
    )


def test_false_alarms_among_new_normals():
    """Each of 24 fits has its own 40 normals; the mean over all of the share p <= 0.2 has a
    deviation of about sqrt(0.2 * 0.8 / 41 / 24) = 0.013 by the calibration sets alone."""
    found = []
    for seed in range(24):
        detector = fitted(normals(40, seed=seed), cross_fit=3, seed=seed, train_steps=10)
        assert detector.conformal.groups == 40
        found.append(float((detector.score(normals(200, seed=1000 + seed)).p_value <= 0.2).mean()))
    assert 0.13 < np.mean(found) < 0.24


def test_a_checkpoint_keeps_it(tmp_path):
    detector = fitted(cross_fit=3)
    detector.save(tmp_path / "d.diffad")
    again, x = daf.load(tmp_path / "d.diffad"), normals(9, seed=2)
    one, other = detector.score(x), again.score(x)
    assert np.array_equal(one.score, other.score) and np.array_equal(one.p_value, other.p_value)
    assert np.array_equal(one.label, other.label)  # 30 groups are enough
    assert again.config.cross_fit == 3
    assert any("cross-fitted: 3 models" in note for note in again.history.notes)
    with pytest.raises(InputError, match="not kept in files"):
        again.calibrate(normals(30))


def test_calibrating_anew_follows_the_options_of_scoring():
    x = normals(30)
    detector = fitted(x, cross_fit=3)
    before = detector.conformal.scores.copy()
    detector.calibrate(x)
    assert np.array_equal(detector.conformal.scores, before)
    detector.model.config = detector.config.replace(sigmas=(1.0,))
    detector.calibrate(x, ["one_step"])
    assert len(detector.statistics) == 2 and not np.array_equal(detector.conformal.scores, before)


@pytest.mark.parametrize(
    "options, n, parts",
    [
        ({}, 40, 5),
        ({"preset": "fast"}, 40, 1),
        ({"cross_fit": 0}, 40, 1),
        ({"cross_fit": 3}, 140, 3),
        ({}, 140, 1),  # 21 held out for p-values are enough
    ],
)
def test_who_is_cross_fitted_by_default(options, n, parts):
    detector = daf.Detector(**{**IMAGES, "train_steps": 2, **options}).fit(pictures(n))
    assert len(detector.parts) == parts
    assert detector.conformal.groups == (n if parts > 1 else round(0.15 * n))
    assert len(fitted(train_steps=2).parts) == 1  # tables are not


def test_groups_stay_together():
    groups = [i // 3 for i in range(30)]
    detector = fitted(cross_fit=4, groups=groups)
    assert detector.conformal.groups == 10 and len(detector.conformal.scores) == 30
    for _, split in detector.parts:
        assert not {groups[i] for i in split.fit} & {groups[i] for i in split.conformal}


def test_the_budget_is_that_of_all_models(monkeypatch):
    learn, budgets = TokenModel.learn, []

    def learn_and_tell(self, *arguments):
        budgets.append(self.config.train_budget)
        return learn(self, *arguments)

    monkeypatch.setattr(TokenModel, "learn", learn_and_tell)
    detector = fitted(cross_fit=3, train_budget=0.4)
    assert budgets == [0.1] * 4 and detector.config.train_budget == 0.4


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cross_fit": 1}, "cross_fit.*from 2 to inf, not 1"),
        ({"cross_fit": -2}, "cross_fit.*-2"),
        ({"cross_fit": 3, "denoiser": "unet-tiny"}, "cross_fit .*token MLP"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(InputError, match=words):
        daf.Detector(**options)
