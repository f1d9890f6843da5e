"""DiffAD: what PyOD asks of any detector."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

pytest.importorskip("pyod")
pytest.importorskip("combo")  # pyod.models.combination needs it

import joblib  # noqa: E402
from pyod.models.combination import average, maximization  # noqa: E402
from pyod.models.knn import KNN  # noqa: E402
from pyod.utils.data import generate_data  # noqa: E402
from pyod.utils.utility import standardizer  # noqa: E402

from diffad_fast.integrations.pyod import DiffAD  # noqa: E402

QUICK = {"options": {"token_width": 32, "token_blocks": 1}, "device": "cpu", "random_state": 0}
N_TRAIN, N_TEST, SHARE = 300, 100, 0.1


@pytest.fixture(scope="module")
def data():
    return generate_data(
        n_train=N_TRAIN, n_test=N_TEST, n_features=6, contamination=SHARE, random_state=42
    )


@pytest.fixture(scope="module")
def fitted(data):
    return DiffAD(contamination=SHARE, train_steps=60, **QUICK).fit(data[0])


def test_attributes_and_quality(fitted, data):
    X_train, X_test, y_train, y_test = data
    assert fitted.decision_scores_.shape == fitted.labels_.shape == (N_TRAIN,)
    assert set(np.unique(fitted.labels_)) == {0, 1}
    assert fitted._mu == pytest.approx(fitted.decision_scores_.mean())
    assert fitted._sigma == pytest.approx(fitted.decision_scores_.std())
    assert fitted.labels_.sum() == pytest.approx(SHARE * N_TRAIN, abs=1)
    np.testing.assert_array_equal(fitted.labels_, fitted.decision_scores_ > fitted.threshold_)
    np.testing.assert_array_equal(fitted.decision_function(X_train), fitted.decision_scores_)
    assert roc_auc_score(y_test, fitted.decision_function(X_test)) > 0.9


def test_predictions_probabilities_and_confidence(fitted, data):
    X, y = data[1], data[3]
    labels = fitted.predict(X)
    assert labels.shape == y.shape
    np.testing.assert_array_equal(labels, fitted.decision_function(X) > fitted.threshold_)
    for method in ("linear", "unify"):
        probability = fitted.predict_proba(X, method=method)
        assert probability.shape == (N_TEST, 2)
        assert probability.min() >= 0 and probability.max() <= 1
        np.testing.assert_allclose(probability.sum(axis=1), 1)
        assert roc_auc_score(y, probability[:, 1]) > 0.9
    with pytest.raises(ValueError):
        fitted.predict_proba(X, method="nothing")
    for both in (fitted.predict(X, return_confidence=True),
                 fitted.predict_proba(X, return_confidence=True)):  # fmt: skip
        confidence = both[1]
        assert confidence.shape == (N_TEST,) and 0 <= confidence.min() <= confidence.max() <= 1
    assert set(np.unique(fitted.predict_with_rejection(X))) <= {-2, 0, 1}
    rank = fitted._predict_rank(X)
    assert rank.shape == (N_TEST,) and rank.max() <= N_TRAIN + 1
    assert fitted._predict_rank(X, normalized=True).max() <= 1.0001


def test_fit_predict_and_score(data):
    X, y = data[0], data[2]
    detector = DiffAD(contamination=SHARE, train_steps=20, **QUICK)
    assert detector.fit_predict(X).shape == (N_TRAIN,)
    assert detector.fit_predict_score(X, y) > 0.8
    assert detector.fit_predict_score(X, y, scoring="prc_n_score") > 0
    with pytest.raises(NotImplementedError):
        detector.fit_predict_score(X, y, scoring="something")


def test_save_load_and_clone(fitted, data, tmp_path):
    joblib.dump(fitted, tmp_path / "model.joblib")
    again = joblib.load(tmp_path / "model.joblib")
    np.testing.assert_array_equal(
        again.decision_function(data[1]), fitted.decision_function(data[1])
    )
    fresh = clone(fitted)
    assert fresh.get_params() == fitted.get_params() and not hasattr(fresh, "threshold_")


def test_in_a_combination_of_scores(fitted, data):
    X, y = data[1], data[3]
    knn = KNN().fit(data[0])
    columns = [[d.decision_scores_, d.decision_function(X)] for d in (fitted, knn)]
    train, test = (np.stack(c, axis=1) for c in zip(*columns, strict=True))
    test = standardizer(train, test)[1]
    for combine in (average, maximization):
        assert roc_auc_score(y, combine(test)) > 0.9


def test_images():
    rng = np.random.default_rng(0)
    X = rng.uniform(0.4, 0.6, size=(24, 1, 32, 32)).astype(np.float32)
    detector = DiffAD(
        preset="fast", train_steps=2, device="cpu", random_state=0,
        options={"denoiser": "token-mlp", "token_width": 32, "tokens": ("cell-8",)},
    ).fit(X)  # fmt: skip
    broken = X[:4].copy()
    broken[:, :, 8:20, 8:20] = rng.choice([0.0, 1.0], size=(4, 1, 12, 12))
    assert detector.predict(broken).all() and detector.decision_scores_.shape == (24,)


def test_errors(data):
    with pytest.raises(ValueError, match="contamination must be in"):
        DiffAD(contamination=0.6)
    with pytest.raises(ValueError, match="has shape .20, 2, 3.: give rows"):
        DiffAD(**QUICK).fit(np.zeros((20, 2, 3)))
    with pytest.raises(ValueError, match="fitted on 6"):
        DiffAD(train_steps=2, **QUICK).fit(data[0]).decision_function(data[0][:, :4])
    with pytest.raises(ValueError, match="NaN"):
        DiffAD(**QUICK).fit(np.full((20, 2), np.nan))


def test_plain_arrays_are_checked_as_by_scikit_learn(fitted, data):
    """They take a shorter way: the same scores and errors."""
    X = data[1]
    expected = fitted.decision_function(X.tolist())  # the long way
    for same in (X, X.astype(np.float32), np.asfortranarray(X)):
        np.testing.assert_array_equal(fitted.decision_function(same), expected)
    for value, message in ((np.nan, "NaN"), (1e300, "too large"), (np.inf, "infinity")):
        bad = X.copy()
        bad[2, 1] = value
        with pytest.raises(ValueError, match=message):
            fitted.decision_function(bad)
    for shape, message in (((0, 6), "0 sample"), ((6,), "1D array")):
        with pytest.raises(ValueError, match=message):
            fitted.decision_function(np.zeros(shape))
    with pytest.raises(NotFittedError):
        DiffAD(**QUICK).decision_function(X)
