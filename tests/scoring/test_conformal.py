import numpy as np
import pytest
from scipy import stats

from diffad_fast.scoring import Conformal


def test_p_values_by_the_definition():
    rng = np.random.default_rng(0)
    calibration, scores = rng.integers(0, 10, 50), rng.integers(-1, 12, 200)  # ties on purpose
    p = Conformal(calibration, None, 0.05).p_value(scores)
    expected = [(1 + (calibration >= s).sum()) / 51 for s in scores]
    np.testing.assert_allclose(p, expected, rtol=1e-15)


@pytest.mark.parametrize("n", [19, 20, 39, 40, 99, 1000])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.2])
def test_label_is_p_at_most_rate(n, rate):
    rng = np.random.default_rng(n)
    conformal = Conformal(rng.normal(size=n), None, rate)
    scores = np.concatenate([rng.normal(size=300), conformal.scores])
    label = conformal.label(scores)
    if n < 20:
        assert label is None
    elif label is None:
        assert 1 / (n + 1) > rate  # no p-value can be as small as that
        assert f"{n} held-out" in conformal.why_no_label()
    else:
        np.testing.assert_array_equal(label, conformal.p_value(scores) <= rate)


def test_false_positive_rate_is_beta_binomial():
    """Given n calibration scores the realised rate on N others is beta-binomial with parameters
    (k, n + 1 - k), k = floor(rate (n + 1)); over 400 repeats its distribution must fit."""
    n, fresh, rate = 99, 200, 0.05
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(400):
        conformal = Conformal(rng.normal(size=n), None, rate)
        counts.append(conformal.label(rng.normal(size=fresh)).sum())
    k = 5
    law = stats.betabinom(fresh, k, n + 1 - k)
    assert np.mean(counts) == pytest.approx(law.mean(), abs=4 * law.std() / 20)
    uniform = law.cdf(np.array(counts) - 1) + rng.uniform(size=400) * law.pmf(counts)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_too_few_groups_give_no_label():
    conformal = Conformal(np.arange(100.0), np.arange(100) % 19, 0.05)
    assert conformal.label(np.zeros(3)) is None and conformal.threshold is None
    assert "19" in conformal.why_no_label() and "20" in conformal.why_no_label()


SIZES = {
    "alike": [6] * 30,
    "tens": [10] * 59,
    "one large": [200, *[1] * 24],
    "few large": [60] * 14 + [3] * 126,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_groups_count_once(sizes):
    """By the definition, with ties; a label is p at most the rate."""
    rng = np.random.default_rng(1)
    group = rng.permutation(np.repeat(np.arange(len(sizes)) * 7, sizes))
    calibration, scores = rng.integers(0, 40, len(group)), rng.integers(-1, 42, 300)
    for rate in (0.05, 0.1, 0.3):
        conformal = Conformal(calibration, group, rate)
        shares = [
            sum((calibration[group == g] >= s).mean() for g in np.unique(group)) for s in scores
        ]
        # Shares are told apart from 1e-9 on.
        expected = (1 + np.round(shares, 9)) / (len(sizes) + 1)
        assert conformal.groups == len(sizes)
        np.testing.assert_allclose(conformal.p_value(scores), expected, rtol=1e-13)
        np.testing.assert_array_equal(conformal.label(scores), expected <= rate)
        # Without ties, and at the calibration scores themselves: the threshold is the right one.
        distinct = Conformal(rng.normal(size=len(group)), group, rate)
        p = distinct.p_value(distinct.scores)
        np.testing.assert_array_equal(distinct.label(distinct.scores), p <= rate)
        assert p.max() <= 1


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_p_values_hold_for_a_new_group(sizes):
    """Samples of a group that share most of what makes them differ: of new groups at most a share
    of u has p <= u. 4,000 trials, so a deviation of 0.0035 at 0.05 and of 0.0063 at 0.2."""
    rng = np.random.default_rng(2)
    trials, found = 4000, []
    for _ in range(trials):
        common = rng.normal(size=len(sizes) + 1)
        group = np.repeat(np.arange(len(sizes)), sizes)
        scores = common[group] + 0.3 * rng.normal(size=len(group))
        new = common[-1:] + 0.3 * rng.normal(size=1)
        found.append(Conformal(scores, group, 0.05).p_value(new)[0])
    found = np.array(found)
    for u in (0.05, 0.1, 0.2):
        bound = u + 3 * np.sqrt(u * (1 - u) / trials)
        assert u / 3 < (found <= u).mean() <= bound
