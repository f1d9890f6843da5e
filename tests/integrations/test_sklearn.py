"""DiffusionOutlierDetector against scikit-learn's own checks and in its tools."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from diffad_fast.integrations.sklearn import DiffusionOutlierDetector

QUICK = {"train_steps": 3, "options": {"token_width": 32, "token_blocks": 1}, "device": "cpu"}


@parametrize_with_checks([DiffusionOutlierDetector(**QUICK)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def ring(n, seed):
    """Inliers on a circle with noise; outliers are in its middle, where a Gaussian sees none."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, n)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return circle * 3 + 0.1 * rng.normal(size=(n, 2))


@pytest.fixture(scope="module")
def fitted():
    options = {"token_width": 64, "sigmas": (0.1, 0.2, 0.4)}
    return DiffusionOutlierDetector(
        train_steps=300, options=options, device="cpu", random_state=0, contamination=0.05
    ).fit(ring(600, 0))


def test_finds_what_lies_inside_a_ring(fitted):
    inside = np.random.default_rng(1).normal(size=(100, 2)) * 0.5
    X, y = np.concatenate([ring(300, 2), inside]), np.repeat([1, -1], [300, 100])
    assert roc_auc_score(y, fitted.score_samples(X)) > 0.97
    predicted = fitted.predict(X)
    assert (predicted[y == -1] == -1).mean() > 0.9
    assert (predicted[y == 1] == -1).mean() < 0.15
    assert (fitted.fit_predict is not None) and set(np.unique(predicted)) == {-1, 1}


def test_offset_is_the_share_of_training_samples(fitted):
    assert (fitted.predict(ring(600, 0)) == -1).mean() == pytest.approx(0.05, abs=2 / 600)
    decision = fitted.decision_function(ring(9, 3))
    np.testing.assert_allclose(decision + fitted.offset_, fitted.score_samples(ring(9, 3)))


def test_scores_are_those_of_the_detector(fitted):
    X = ring(20, 4)
    np.testing.assert_array_equal(-fitted.score_samples(X), fitted.detector_.score(X).score)


def test_random_state_decides():
    X, made = ring(60, 0), lambda seed: DiffusionOutlierDetector(**QUICK, random_state=seed)
    a, b, c = (made(seed).fit(X).score_samples(X) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


def test_pickle_and_clone(fitted):
    X = ring(10, 5)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.score_samples(X), fitted.score_samples(X))
    fresh = clone(fitted)
    assert not hasattr(fresh, "detector_") and fresh.get_params() == fitted.get_params()


def test_pipeline_grid_search_and_cross_validation():
    X = np.concatenate([ring(80, 0), np.random.default_rng(1).normal(size=(8, 2)) * 0.3])
    y = np.repeat([1, -1], [80, 8])
    X, y = X[::-1].copy(), y[::-1].copy()
    pipeline = make_pipeline(StandardScaler(), DiffusionOutlierDetector(**QUICK, random_state=0))
    pipeline.fit(X)
    assert pipeline.score_samples(X).shape == pipeline.predict(X).shape == (88,)
    folds = StratifiedKFold(2)
    scores = cross_val_score(pipeline, X, y, scoring="roc_auc", cv=folds)
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()
    grid = {"diffusionoutlierdetector__train_steps": [2, 4]}
    search = GridSearchCV(pipeline, grid, scoring="roc_auc", cv=folds).fit(X, y)
    assert search.best_params_.keys() == grid.keys()


def test_plain_arrays_are_checked_as_by_scikit_learn(fitted):
    """They take a shorter way: the same scores and errors, whatever their dtype and layout."""
    X = ring(6, 6)
    expected = fitted.score_samples(X.tolist())  # the long way
    read_only = np.asfortranarray(X, np.float32)
    read_only.flags.writeable = False
    for same in (X, X.astype(np.float32), read_only, X[::-1].copy()[::-1]):
        np.testing.assert_array_equal(fitted.score_samples(same), expected)
    wrong = {"contains NaN": np.nan, "infinity or a value too large": np.inf, "too large": 1e300}
    for message, value in wrong.items():
        bad = X.copy()
        bad[2, 1] = value
        with pytest.raises(ValueError, match=message):
            fitted.score_samples(bad)
    with pytest.raises(ValueError, match="X has 3 features, but .* is expecting 2"):
        fitted.score_samples(np.zeros((4, 3)))
    for shape, message in (((0, 2), "0 sample"), ((2,), "1D array"), ((2, 2, 2), "dim 3")):
        with pytest.raises(ValueError, match=message):
            fitted.score_samples(np.zeros(shape))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frames(library):
    frames = pytest.importorskip(library)
    X = ring(60, 0)
    frame = frames.DataFrame({"x": X[:, 0], "y": X[:, 1]})
    detector = DiffusionOutlierDetector(**QUICK, random_state=0).fit(frame)
    assert list(detector.feature_names_in_) == ["x", "y"]
    expected = DiffusionOutlierDetector(**QUICK, random_state=0).fit(X)
    np.testing.assert_array_equal(detector.score_samples(frame), expected.score_samples(X))
    with pytest.raises(ValueError, match="feature names"):
        detector.predict(frame[["y", "x"]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        detector.predict(X)


def test_flattened_images():
    rng = np.random.default_rng(0)
    X = rng.uniform(0.4, 0.6, size=(24, 3 * 32 * 32))
    detector = DiffusionOutlierDetector(
        "fast", image_shape=(3, 32, 32), train_steps=2, device="cpu", random_state=0,
        options={"preset": "best", "token_width": 32, "tokens": ("cell-8",), "cross_fit": 0},
    ).fit(X)  # fmt: skip
    assert detector.detector_.config.preset == "best"
    broken = X[:5].copy().reshape(5, 3, 32, 32)
    broken[:, :, 8:20, 8:20] = rng.choice([0.0, 1.0], size=(5, 1, 12, 12))
    assert (detector.predict(broken.reshape(5, -1)) == -1).all()
    image = detector.detector_.score(X.reshape(-1, 3, 32, 32).astype(np.float32))
    np.testing.assert_array_equal(-detector.score_samples(X), image.score)


class Own(torch.nn.Module):
    """A denoiser of one's own."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x, log_sigma):
        return self.layer(x)


def test_a_fit_leaves_a_denoiser_among_the_options_as_it_was():
    X, own = np.random.default_rng(0).uniform(size=(24, 32 * 32)), Own()
    options = {"denoiser": own, "haar_level": 1, "map_weights": (1, 0, 1), "batch_size": 4}
    detector = DiffusionOutlierDetector(
        image_shape=(32, 32), train_steps=2, options=options, device="cpu", random_state=0
    )
    before = own.layer.weight.detach().clone()
    scores = detector.fit(X).score_samples(X)
    assert torch.equal(own.layer.weight, before)
    for again in (clone(detector), detector):
        np.testing.assert_array_equal(again.fit(X).score_samples(X), scores)


@pytest.mark.parametrize("change, message", [
    ({"contamination": 0.0}, r"contamination must be in \(0, 0.5\], not 0.0"),
    ({"image_shape": (4, 4)}, "image_shape .4, 4. has 16 values and a row of X has 2"),
    ({"contamination": None}, "contamination must be in .* not None"),
    ({"image_shape": (2,)}, "image_shape is .H, W. or .C, H, W., not .2,"),
    ({"image_shape": 32}, "image_shape is .H, W. or .C, H, W., not 32"),
    ({"image_shape": (-1, -2)}, "image_shape is .H, W. or .C, H, W., not .-1, -2"),
    ({"options": [1]}, r"options is a dictionary of options by name, not \[1\]"),
    ({"options": {"token_widht": 3}}, "did you mean 'token_width'"),
    ({"preset": "quick"}, "unknown preset 'quick'"),
])  # fmt: skip
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        DiffusionOutlierDetector(**{**QUICK, **change}).fit(ring(30, 0))


def test_training_samples_score_as_new_ones_do():
    X, new = (np.random.default_rng(i).normal(size=(n, 20)) for i, n in ((0, 1000), (1, 2000)))
    found = DiffusionOutlierDetector(
        train_steps=150, options={"token_width": 64}, random_state=0, device="cpu"
    ).fit(X)
    flagged = found.predict(X) == -1
    trained = np.isin(np.arange(1000), found.detector_.parts[0].split.fit)
    assert abs(flagged[trained].mean() - flagged[~trained].mean()) < 0.06
    assert (found.predict(new) == -1).mean() == pytest.approx(0.1, abs=0.04)


def test_an_offset_that_float32_cannot_hold():
    with pytest.raises(ValueError, match="column 1 of the table .* too little for float32"):
        DiffusionOutlierDetector(**QUICK).fit(ring(60, 0) + [0, 1e9])


def test_too_few_samples():
    with pytest.raises(ValueError, match="minimum of 8 is required"):
        DiffusionOutlierDetector(**QUICK).fit(ring(7, 0))
