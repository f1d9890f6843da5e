"""Detectors on tables: columns with names, columns that never vary."""

import copy
import pickle

import numpy as np
import pytest
import torch

import diffad_fast as daf
from diffad_fast.errors import InputError
from diffad_fast.models import tokens

OPTIONS = {"token_width": 32, "token_blocks": 1, "device": "cpu"}


def table(path, names: str, rows: np.ndarray):
    """A CSV file whose columns are those of rows (N,3), which are called a, b and c."""
    lines = [",".join(str(row["abc".index(name)]) for name in names) for row in rows.tolist()]
    path.write_text("\n".join([",".join(names), *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(200, 3)) * [1, 10, 100]


@pytest.fixture(scope="module")
def fitted(rows, tmp_path_factory):
    path = table(tmp_path_factory.mktemp("table") / "abc.csv", "abc", rows)
    return daf.Detector("vector", train_steps=20, **OPTIONS).fit(path)


def test_columns_in_any_order_give_the_same_scores(fitted, rows, tmp_path):
    expected = fitted.score(rows[:20]).score
    assert fitted.columns == ["a", "b", "c"]
    for names in ("abc", "cab", "bac"):
        path = table(tmp_path / "t.csv", names, rows[:20])
        assert np.array_equal(fitted.score(path).score, expected)
    assert not np.array_equal(fitted.score(rows[:20, ::-1]).score, expected)
    with pytest.raises(InputError, match="lacks the column 'b'"):
        fitted.score(table(tmp_path / "t.csv", "ac", rows))
    with pytest.raises(InputError, match="2 features and the detector was fitted on 3"):
        fitted.score(rows[:, :2])


def test_names_of_columns_are_kept(fitted, rows, tmp_path):
    turned = table(tmp_path / "t.csv", "cba", rows[:20])
    expected = fitted.score(rows[:20]).score
    fitted.save(tmp_path / "m.diffad")
    for again in (
        daf.load(tmp_path / "m.diffad", device="cpu"),
        pickle.loads(pickle.dumps(fitted)),
        copy.deepcopy(fitted),
    ):
        assert again.columns == ["a", "b", "c"]
        assert np.array_equal(again.score(turned).score, expected)
    fitted.export(tmp_path / "m.pt2")
    program = torch.export.load(str(tmp_path / "m.pt2")).module()
    found = program(torch.from_numpy(rows[:20]).float())["score"]
    assert found.numpy() == pytest.approx(expected, rel=1e-4)


def test_a_second_fit_replaces_the_names(rows, tmp_path):
    detector = daf.Detector("vector", train_steps=2, **OPTIONS)
    assert detector.columns is None
    detector.fit(table(tmp_path / "t.csv", "abc", rows))
    assert detector.fit(table(tmp_path / "t.csv", "cb", rows)).columns == ["c", "b"]
    assert detector.fit(rows).columns is None
    assert len(detector.score(table(tmp_path / "t.csv", "cba", rows))) == 200


def test_a_rare_value_has_a_unit(monkeypatch):
    """A column that is 0 but for a few rows, none of them among those that statistics are from."""
    x = np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32)
    x[:, 2:] = [0, 7]
    options = {"train_steps": 2, **OPTIONS}
    part = daf.Detector("vector", **options).fit(x).parts[0].split.fit
    monkeypatch.setattr(tokens, "LARGEST_FIT", 100)
    seen = part[:: -(-len(part) // 100)]
    unseen = sorted(set(part) - set(seen))
    x[unseen[::50], 2] = 1e-4
    found = daf.Detector("vector", **options).fit(x).model.representation
    deviation, mean = x[seen].std(axis=0), x[seen].mean(axis=0)
    deviation[2], mean[2] = x[part, 2].std(), x[part, 2].mean()
    deviation[3] = 1
    assert found.deviation.numpy() == pytest.approx(deviation, rel=1e-4)
    assert found.mean.numpy() == pytest.approx(mean, rel=1e-4, abs=1e-7)


def test_a_flag_counts_beside_columns_in_large_units():
    """It is 0 on all normals; what it is divided by is not what the others are measured in."""
    x = np.random.default_rng(0).normal(size=(640, 6))
    x[:, 4] *= 1e4
    x[:, 5] = 0
    detector = daf.Detector("vector", train_steps=200, **OPTIONS).fit(x[:600])
    means = []
    for flag in (0, 1, 10, 100):
        x[600:, 5] = flag
        means.append(detector.score(x[600:]).score.mean())
    x[600:, 5] = 0
    x[600:, 0] += 10
    ten_deviations = detector.score(x[600:]).score.mean()
    assert means[0] < 0.5 and means[1] > 1 and means[3] > 10
    assert means[2] == pytest.approx(ten_deviations, rel=0.25)
