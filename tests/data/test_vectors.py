import contextlib

import numpy as np
import pytest
import torch
from scipy import sparse

from diffad_fast.data.vectors import open_vectors
from diffad_fast.errors import InputError

X = np.arange(12.0).reshape(4, 3)


def test_sources(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "x.npz", X=X, y=[0, 1, 0, 1])
    (tmp_path / "x.csv").write_text("a,label,b,c\n0,0,1,2\n3,1,4,5\n6,0,7,8\n9,1,10,11\n")
    for source, labelled in (
        (X, False), (X.tolist(), False), (torch.from_numpy(X), False), (X.astype(np.uint8), False),
        (torch.from_numpy(X).bfloat16(), False), ((X, [0, 1, 0, 1]), True),
        (tmp_path / "x.npy", False), (str(tmp_path / "x.npz"), True), (tmp_path / "x.csv", True),
    ):  # fmt: skip
        vectors = open_vectors(source)
        (batch,) = vectors.batches(9)
        assert batch.x.dtype == torch.float32 and np.array_equal(batch.x.numpy(), X)
        assert (vectors.labels is not None) == labelled
        assert not labelled or vectors.labels.tolist() == [0, 1, 0, 1]
    batches = list(vectors.batches(2, [3, 0, 1]))
    assert [b.index.tolist() for b in batches] == [[3, 0], [1]]
    assert torch.equal(batches[0].x, torch.from_numpy(X[[3, 0]]).float())


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros(3), r"shape \(3,\).*reshape"),
        (np.zeros((0, 3)), "empty"),
        (np.array([[1.0, np.nan]]), "nan in row 0, column 1"),
        (np.array([[1.0], [1e300]]), "inf in row 1, column 0"),
        ([[1, 2], [3, "b"]], "not a table of numbers: it has 'b' in row 1, column 1: give numbers"),
        ([[1, 2], [3]], "not a table of numbers: .* inhomogeneous"),
        (np.array(3.0), r"shape \(\).*reshape"),
        ({"a": [1, 2]}, "a dict is not a table of numbers: give an array, tensor, data frame or a"),
        ((row for row in X), "a generator is not a table of numbers"),
        (torch.utils.data.DataLoader(X), "a DataLoader is not a table of numbers"),
        (sparse.csr_matrix(X), r"a csr_matrix is not a table of numbers: give its toarray\(\)"),
        (X.astype("M8[s]"), "not a table of numbers: it has dates or times"),
        (X.astype("m8[ns]"), "it has dates or times"),
        (np.array([[1.0, np.timedelta64(5, "ns")]], dtype=object), "it has dates or times"),
        (X + 1j, "not a table of numbers: its values are complex"),
        (np.ma.masked_greater(X, 5), "masked values"),
        ((X, np.ma.masked_equal([0, 0, 1, 1], 1)), "labels of the table have masked values"),
        ((X, [0, 1]), "4 rows and 2 labels"),
        ((X, [0, 1, 2, 0]), "0 for a normal row"),
        ("table.parquet", "no table"),
        ("missing.npy", "no file missing.npy"),
    ],
)
def test_what_is_no_table(source, message):
    with pytest.raises(InputError, match=message):
        open_vectors(source)


def test_files_that_are_no_table(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"not numpy")
    (tmp_path / "short.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "words.csv").write_text("a,b\n1,two\n")
    (tmp_path / "nameless.csv").write_text("1,2\n3,4\n")
    (tmp_path / "long.csv").write_text("a,b\n1," + "2" * 140_000 + "\n")
    np.savez(tmp_path / "other.npz", Z=X)
    np.savez(tmp_path / "objects.npz", X=np.array([[1, "a"]], dtype=object))
    (tmp_path / "hole.csv").write_text("a,b\n1,2\n3,\n")
    (tmp_path / "numbered.csv").write_text(",a\n0,5\n1,7\n")
    for name, message in (
        ("x.npy", "cannot be read"), ("short.csv", "1 values in data line 2"),
        ("words.csv", "'two' in data line 1, column 'b': give numbers"),
        ("nameless.csv", "first line of .*nameless.csv holds numbers"),
        ("long.csv", "cannot be read as a table: field larger"),
        ("other.npz", "no array X, only Z"), ("objects.npz", "objects of Python, so save"),
        ("hole.csv", "'' in data line 2, column 'b': give numbers, and fill missing"),
        ("numbered.csv", "column 0 of .*numbered.csv has no name: .*numbers the rows"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            open_vectors(tmp_path / name)


def test_a_mark_in_front_of_a_table_is_no_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("label,x\n0,1.5\n1,2.5\n", encoding="utf-8-sig")
    found = open_vectors(path)
    assert found.labels.tolist() == [0, 1] and found.rows.tolist() == [[1.5], [2.5]]


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, X=np.zeros((3, 2)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(InputError, match="a.npz cannot be read as a table"):
        open_vectors(path)


def test_damaged_files_are_named_whatever_their_readers_raise(tmp_path):
    """Such as zlib.error, NotImplementedError, TypeError and tokenize.TokenError."""
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "a.npz", X=rng.normal(size=(50, 2)))
    np.save(tmp_path / "a.npy", X)
    for path, most in ((tmp_path / "a.npz", None), (tmp_path / "a.npy", 128)):
        whole, refused = path.read_bytes(), 0
        for place in rng.integers(most or len(whole), size=150):
            path.write_bytes(whole[:place] + rng.bytes(1) + whole[place + 1 :])
            try:
                open_vectors(path)
            except InputError as error:
                refused += path.name in str(error)
        assert refused > 75


def test_a_file_is_what_it_holds_whatever_it_is_called(tmp_path):
    np.save(tmp_path / "a.npy", X)
    np.savez(tmp_path / "b.npz", X=X, y=[0, 0, 1, 1])
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    assert (open_vectors(tmp_path / "a.npz").rows == X).all()
    found = open_vectors(tmp_path / "b.npy")
    assert (found.rows == X).all() and found.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("offset, lost", [(0.0, False), (1e4, False), (1e6, True), (1e9, True)])
def test_differences_that_float32_cannot_hold(offset, lost):
    rows = np.random.default_rng(0).normal(size=(5000, 3))
    rows[:, 1] += offset
    rows[:, 2] = 0.1 + offset  # what never varies is no loss
    told = pytest.raises(InputError, match="^column 1 of the table has values up to")
    with told if lost else contextlib.nullcontext():
        open_vectors(rows).check_normal()


class Frame:
    """What of data frames is read: an array, names, and the types of polars."""

    def __init__(self, names, dtypes=(), attribute="columns"):
        setattr(self, attribute, names)
        self.dtypes = dtypes

    def __array__(self, dtype=None, copy=None):
        return X


def test_names_of_columns(tmp_path):
    (tmp_path / "x.csv").write_text("a,label,b,c\n0,0,1,2\n3,1,4,5\n")
    np.savez(tmp_path / "x.npz", X=X)
    arrow = Frame([X[:, 0]] * 3)
    arrow.column_names = ["a", "b", "c"]
    for source, names in (
        (tmp_path / "x.csv", ["a", "b", "c"]), (tmp_path / "x.npz", None), (X, None),
        (Frame(np.array(["u", "v", "w"])), ["u", "v", "w"]), (Frame(range(3)), None),
        (Frame(["u", 1, "w"]), None), (arrow, ["a", "b", "c"]), ((arrow, [0] * 4), ["a", "b", "c"]),
    ):  # fmt: skip
        found = open_vectors(source).columns
        assert found == names and (names is None or {type(n) for n in found} == {str})


def test_what_is_no_number_in_a_frame_is_told_with_its_column():
    class Mixed(Frame):
        def __init__(self, value):
            super().__init__(["u", "v", "w"])
            self.rows = np.array([[1, True, 2.5], [2, False, value]], dtype=object)

        def __array__(self, dtype=None, copy=None):
            return self.rows

    assert open_vectors(Mixed(3)).rows.tolist() == [[1, 1, 2.5], [2, 0, 3]]
    for value, message in (
        ("red", "it has 'red' in row 1, column 'w': give numbers"),
        (np.str_("red"), "it has 'red' in row 1, column 'w'"),
        (object, "it has <class 'object'> in row 1, column 'w'"),
        (None, "holds nan in row 1, column 'w': remove or replace missing"),
    ):
        with pytest.raises(InputError, match=message):
            open_vectors(Mixed(value))


def test_columns_are_arranged_by_name():
    found = open_vectors((Frame(["c", "a", "b"]), [0, 1, 0, 1]))
    assert found.arranged(None) is found and found.arranged(["c", "a", "b"]) is found
    assert open_vectors(X).arranged(["a", "b"]).rows.shape == (4, 3)  # counted by the detector
    again = found.arranged(["a", "b", "c"])
    assert np.array_equal(again.rows, X[:, [1, 2, 0]]) and again.rows.flags.c_contiguous
    assert again.columns == ["a", "b", "c"] and again.labels.tolist() == [0, 1, 0, 1]
    assert found.columns == ["c", "a", "b"] and np.array_equal(found.rows, X)
    for names, fitted, message in (
        (["c", "x", "y"], ["a", "b", "c"], "has a column 'x' that .* and lacks the column 'a'"),
        (["a", "b", "c"], ["a", "b"], "has a column 'c' that the fit had not: give"),
        (["a", "b", "c"], ["a", "b", "c", "d"], "the table lacks the column 'd': give"),
        (["a", "b", "b"], ["b", "a"], "'b' is the name of several"),
        (["a", "b", "c"], ["c", "c", "a", "b"], "'c' is the name of several"),
    ):
        with pytest.raises(InputError, match=message):
            open_vectors(Frame(names)).arranged(fitted)
    twins = open_vectors(Frame(["a", "a", "b"]))
    assert twins.arranged(["a", "a", "b"]) is twins


def test_times_that_a_frame_has_made_numbers():
    class Time:
        def is_temporal(self):
            return True

    class Number(Time):
        def is_temporal(self):
            return False

    assert len(open_vectors(Frame(["a", "b", "c"], [Number()] * 3))) == 4
    with pytest.raises(InputError, match="dates or times"):
        open_vectors(Frame(["a", "b", "c"], [Number(), Time(), Number()]))
