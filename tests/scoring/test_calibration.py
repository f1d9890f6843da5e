import numpy as np
import pytest
from scipy import stats

from diffad_fast.scoring import Conformal


def test_p_values_by_the_definition():
    rng = np.random.default_rng(0)
    calibration, scores = rng.integers(0, 10, 50), rng.integers(-1, 12, 200)  # ties on purpose
    p = Conformal(calibration, 50, 0.05).p_value(scores)
    expected = [(1 + (calibration >= s).sum()) / 51 for s in scores]
    np.testing.assert_allclose(p, expected, rtol=1e-15)


@pytest.mark.parametrize("n", [19, 20, 39, 40, 99, 1000])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.2])
def test_label_is_p_at_most_rate(n, rate):
    rng = np.random.default_rng(n)
    conformal = Conformal(rng.normal(size=n), 1000, rate)
    scores = np.concatenate([rng.normal(size=300), conformal.scores])
    label = conformal.label(scores)
    if label is None:
        assert 1 / (n + 1) > rate  # no p-value can be as small as that
        assert f"{n} held-out" in conformal.why_no_label()
    else:
        np.testing.assert_array_equal(label, conformal.p_value(scores) <= rate + 1e-12)


def test_false_positive_rate_is_beta_binomial():
    """Given n calibration scores the realised rate on N others is beta-binomial with parameters
    (k, n + 1 - k), k = floor(rate (n + 1)); over 400 repeats its distribution must fit."""
    n, fresh, rate = 99, 200, 0.05
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(400):
        conformal = Conformal(rng.normal(size=n), n, rate)
        counts.append(conformal.label(rng.normal(size=fresh)).sum())
    k = 5
    law = stats.betabinom(fresh, k, n + 1 - k)
    assert np.mean(counts) == pytest.approx(law.mean(), abs=4 * law.std() / 20)
    uniform = law.cdf(np.array(counts) - 1) + rng.uniform(size=400) * law.pmf(counts)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_too_few_groups_give_no_label():
    conformal = Conformal(np.arange(100.0), 19, 0.05)
    assert conformal.label(np.zeros(3)) is None and conformal.threshold is None
    assert "19" in conformal.why_no_label() and "20" in conformal.why_no_label()
