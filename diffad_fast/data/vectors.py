"""Vectors from anywhere: the rows of tables, embeddings."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..arrays import check_unmasked, to_numpy
from ..errors import InputError
from .samples import Batch, Samples

# Rows by which a column's precision is judged, and the least deviation, as a share of the largest
# value: a hundred roundings of float32.
SAMPLE, SMALLEST_SHARE = 4096, 100 * 2.0**-24
# Rows that are checked together: a table may be a file that memory does not hold.
CHECKED = 4096

_SUFFIXES = (".npy", ".npz", ".csv")
_GIVE_NUMBERS = "give numbers, and fill missing values or leave out their rows"


class Vectors(Samples):
    """Rows (N,D) of one table, in the type and the place they came in; made by
    :func:`open_vectors`."""

    unit = "row"

    def __init__(
        self,
        rows: np.ndarray,
        labels: np.ndarray | None = None,
        columns: list[str] | None = None,
        name: str = "the table",
    ):
        super().__init__(opened_as=("vector",))
        self.rows, self.labels, self.columns, self.name = rows, labels, columns, name

    def __len__(self) -> int:
        return len(self.rows)

    length = property(__len__)

    def load(self) -> Sequence[int]:
        """The indices of the usable rows: all."""
        return range(len(self))

    def arranged(self, columns: list[str] | None) -> Vectors:
        """These rows with their columns in the order of ``columns``; as they are where these or
        their own names are None. Raises InputError where the names differ."""
        if columns is None or self.columns is None or columns == self.columns:
            return self
        known, found = set(columns), set(self.columns)
        unknown = next((name for name in self.columns if name not in known), None)
        missing = next((name for name in columns if name not in found), None)
        if unknown is not None or missing is not None:
            parts = [
                "" if unknown is None else f"has a column {unknown!r} that the fit had not",
                "" if missing is None else f"lacks the column {missing!r}",
            ]
            raise InputError(
                f"the table {' and '.join(filter(None, parts))}: give the columns of the fit, in "
                "any order"
            )
        if len(found) < len(self.columns) or len(known) < len(columns):
            names = columns if len(known) < len(columns) else self.columns
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"the columns are not those of the fit in their order, and {twice!r} is the name "
                "of several: give each a name of its own, or keep the order"
            )
        place = {name: i for i, name in enumerate(self.columns)}
        rows = np.ascontiguousarray(self.rows[:, [place[name] for name in columns]])
        return Vectors(rows, self.labels, columns, self.name)

    def check_normal(self) -> None:
        """Raise InputError where nothing can be fitted on these rows: for a column whose
        differences float32 cannot hold beside its offset, and for rows labelled anomalous."""
        some = self.rows[:: -(-len(self.rows) // SAMPLE)].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            deviation, largest = some.std(axis=0), np.abs(some).max(axis=0)
            # A constant column loses nothing, whatever its rounded deviation is.
            lost = (some.min(axis=0) < some.max(axis=0)) & (deviation < SMALLEST_SHARE * largest)
        if lost.any():
            column = int(lost.argmax())
            raise InputError(
                f"column {column} of {self.name} has values up to {largest[column]:.6g} that "
                f"differ by {deviation[column]:.3g}, too little for float32: subtract an offset "
                "first"
            )
        if self.labels is not None and self.labels.any():
            raise InputError(
                f"the table labels {int(self.labels.astype(bool).sum())} of {len(self)} rows "
                "as anomalies: fit on the normal ones alone"
            )

    def batches(self, batch_size: int, indices: Iterable[int] | None = None) -> Iterator[Batch]:
        """Batches of rows in the order of ``indices`` (default: all, in order)."""
        order = np.arange(len(self)) if indices is None else np.fromiter(indices, np.int64)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            yield Batch(torch.from_numpy(_float32(self.rows[part])), torch.from_numpy(part), None)


def open_vectors(source) -> Vectors:
    """Open a table of numbers.

    source: an array, tensor or data frame (N,D), or a file: .npy; .npz with an array ``X`` and
    perhaps labels ``y``, 1 for an anomaly; .csv with one line of names, whose column ``label`` is
    taken for labels; or the pair (X, y). Names of columns are kept, if all are texts. An array, a
    memory map among them, is not copied: it must stay as it is while these rows are used.

    Raises InputError for another shape, for values that are not numbers (dates and times are
    none), NaN or infinite, or beyond float32.
    """
    labels = columns = None
    name = "the table"
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        source, labels, columns = _read(name)
    elif isinstance(source, tuple) and len(source) == 2:
        source, labels = source
    columns = _names(source) if columns is None else columns
    check_unmasked(source, f"{name} has", "fill them, or leave out their rows")
    check_unmasked(labels, f"the labels of {name} have", "leave out their rows")
    try:
        rows = to_numpy(source) if isinstance(source, torch.Tensor) else np.asarray(source)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not a table of numbers: {error}") from None
    if rows.ndim == 0 and rows.dtype == object:
        instead = "its toarray()" if hasattr(source, "toarray") else "an array, tensor, data frame"
        raise InputError(
            f"a {type(source).__name__} is not a table of numbers: give {instead} or a file"
        )
    if rows.ndim != 2:
        raise InputError(f"{name} has shape {rows.shape}: vectors are rows (N, D), so reshape it")
    wrong: object = ""
    if rows.dtype.kind == "c":
        wrong = "its values are complex"
    elif _has_times(source, rows):
        wrong = "it has dates or times, so give numbers, such as days since the first"
    elif rows.dtype.kind not in "fiub":
        try:
            rows = rows.astype(np.float64)
        except (TypeError, ValueError) as error:
            wrong = _no_number(rows, columns) or error
    if wrong:
        raise InputError(f"{name} is not a table of numbers: {wrong}")
    if 0 in rows.shape:
        raise InputError(f"{name} of shape {rows.shape} is empty: give at least one row and column")
    for first in range(0, len(rows), CHECKED):
        part = _float32(rows[first : first + CHECKED])
        bad = ~np.isfinite(part)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(
                f"{name} holds {part[row, column]} in row {first + row}, "
                f"{_called(column, columns)}: remove or replace missing, infinite and huge values "
                "first"
            )
    if labels is not None:
        labels = np.asarray(labels).reshape(-1)
        if len(labels) != len(rows) or not np.isin(labels, (0, 1)).all():
            raise InputError(
                f"{name} has {len(rows)} rows and {len(labels)} labels: a row needs one, 0 for a "
                "normal row and 1 for an anomaly"
            )
        labels = labels.astype(np.int64)
    return Vectors(rows, labels, columns, name)


def _float32(rows: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rows, dtype=np.float32)


def _names(source) -> list[str] | None:
    """Of the columns of a data frame: of pandas, polars or pyarrow."""
    # What pyarrow calls columns is what they hold.
    names = getattr(source, "column_names", None)
    names = getattr(source, "columns", None) if names is None else names
    if names is None:
        return None
    names = list(names)
    # Others are numbers that pandas gives to arrays, which are as good as none.
    return [str(name) for name in names] if all(isinstance(n, str) for n in names) else None


def _called(column: int, columns: list[str] | None) -> str:
    return f"column {column if columns is None else repr(columns[column])}"


def _no_number(rows: np.ndarray, columns: list[str] | None) -> str:
    """The first value that is none, and where it stands; "" where there is no such value."""
    for (row, column), value in np.ndenumerate(rows):
        value = value.item() if isinstance(value, np.generic) else value
        try:
            float(value)
        except (TypeError, ValueError):
            place = f"row {row}, {_called(column, columns)}"
            return f"it has {value!r} in {place}: {_GIVE_NUMBERS}"
    return ""


def _has_times(source, rows: np.ndarray) -> bool:
    """Whether dates or durations in ``source``, which is ``rows`` as an array, would be taken for
    whole numbers of some unit."""
    # Polars has turned them into numbers already, where other columns are numbers.
    if any(t.is_temporal() for t in getattr(source, "dtypes", ()) if hasattr(t, "is_temporal")):
        return True
    if rows.dtype.kind == "O":
        return any(isinstance(x, (np.datetime64, np.timedelta64)) for x in rows.flat)
    return rows.dtype.kind in "mM"


def _read(path: str) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """The table in a file, and its labels and names of columns, where there are any."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"{path} is no table: give a file {', '.join(_SUFFIXES)}")
    try:
        if suffix == ".csv":
            return _read_csv(path)
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):  # whatever it is called
            return content, None, None
        with content:
            if "X" not in content:
                raise InputError(
                    f"{path} has no array X, only {', '.join(content) or 'nothing'}: name it X"
                )
            return content["X"], content["y"] if "y" in content else None, None
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # on damaged files NumPy and zipfile raise all kinds of exceptions
        reason = str(error) or type(error).__name__
        if "allow_pickle" in reason:
            reason = "it holds objects of Python, so save an array of numbers"
        raise InputError(f"{path} cannot be read as a table: {reason}") from None


def _read_csv(path: str) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    values, number = array("d"), 0  # 8 bytes a number, where texts take 60
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark in front
        reader = csv.reader(file)
        names = next(reader, [])
        if names and all(map(_is_number, names)):
            raise InputError(
                f"the first line of {path} holds numbers, and it is that of the names of columns: "
                "write one above it"
            )
        if "" in names:
            raise InputError(
                f"column {names.index('')} of {path} has no name: give it one, or leave it out if "
                "it numbers the rows, as pandas writes them without index=False"
            )
        for number, line in enumerate(filter(None, reader), 1):
            if len(line) != len(names):
                raise InputError(
                    f"{path} has {len(line)} values in data line {number} but {len(names)} names: "
                    "every line needs one for each name"
                )
            try:
                values.extend(map(float, line))
            except ValueError:
                column = next(j for j, x in enumerate(line) if not _is_number(x))
                raise InputError(
                    f"{path} has {line[column]!r} in data line {number}, column "
                    f"{names[column]!r}: {_GIVE_NUMBERS}"
                ) from None
    table = np.asarray(values).reshape(number, len(names))
    if "label" not in names:
        return table, None, names
    column = names.index("label")
    del names[column]
    return np.delete(table, column, axis=1), table[:, column], names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
