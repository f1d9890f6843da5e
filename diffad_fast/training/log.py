"""The log of a training: a CSV file, pictures, and TensorBoard's where that is installed."""

from __future__ import annotations

import csv
import glob
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ..data.image_files import encode_png
from ..errors import InputError
from ..files import write_atomically

COLUMNS = ("step", "seconds", "learning_rate", "loss", "validation_loss", "note")
HEAD = ",".join(COLUMNS).encode()
# What the names of a detector's other networks have after its own.
OTHERS = re.compile(r"(\.fold\d+)?(\.\d+)?\.csv")


class Log:
    """Rows of COLUMNS in a file, flushed one by one; nothing where ``path`` is None.

    A log that is there is continued: rows from step ``start`` on, which a resumed run repeats, go,
    and so do pictures. One that begins removes those of other networks that an earlier run has left
    under its name. TensorBoard's files go to the folder ``path`` with the suffix
    ``.tensorboard``, pictures to that with ``.pictures``.
    Raises InputError where a file cannot be written at first, or is there and is no log; where it
    cannot be later, as on a full disk, a warning says that the training goes on without it.
    """

    def __init__(self, path: str | os.PathLike | None, start: int = 0):
        self._file = self._board = None
        if path is None:
            return
        self._path = path = Path(path)
        if _head(path) not in (b"", HEAD):  # such as the table that is fitted
            raise InputError(
                f"{path} is there and is no log of a training, for which that name is: move it, or "
                "give the detector another name"
            )
        rows = _rows(path, start) if start else []
        for other in [] if start else path.parent.glob(f"{glob.escape(path.stem)}.*.csv"):
            mine = OTHERS.fullmatch(other.name, len(path.stem)) and _head(other) == HEAD
            # Unless it is that of a detector of its own.
            if mine and not other.with_suffix("").exists():
                other.unlink(missing_ok=True)
        self._pictures = path.with_suffix(".pictures")
        for picture in self._pictures.glob("step-*.png"):
            number = picture.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > start:
                picture.unlink(missing_ok=True)
        try:
            self._file = open(path, "w", newline="", encoding="utf-8")
            self._writer = csv.DictWriter(self._file, COLUMNS)
            self._writer.writeheader()
            self._writer.writerows(rows)
            self._file.flush()
        except OSError as error:
            self._close()
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        folder = path.with_suffix(".tensorboard")
        self._board = SummaryWriter(str(folder), purge_step=start or None)

    def note(self, step: int, text: str) -> None:
        """A sentence about what was chosen."""
        if self._file is None:
            return
        with self._as_long_as_it_can_be_written():
            self._writer.writerow({"step": step, "note": text})
            self._file.flush()
            if self._board is not None:
                self._board.add_text("note", text, step)

    def picture(self, steps: int, picture: np.ndarray) -> None:
        """(H,W,3) uint8, drawn after so many steps."""
        try:
            self._pictures.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {self._pictures}: {error.strerror}") from None
        write_atomically(self._pictures / f"step-{steps:07d}.png", encode_png(picture))
        if self._board is not None:
            with self._as_long_as_it_can_be_written():
                self._board.add_image("pictures", picture, steps, dataformats="HWC")

    def write(self, step: int, **values: float) -> None:
        """A row of what is known after ``step``; names are those of COLUMNS."""
        if self._file is None:
            return
        with self._as_long_as_it_can_be_written():
            self._writer.writerow({"step": step, **{k: f"{v:.6g}" for k, v in values.items()}})
            self._file.flush()
            if self._board is not None:
                for name in values.keys() - {"seconds"}:
                    self._board.add_scalar(name, values[name], step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        self._close()

    @contextmanager
    def _as_long_as_it_can_be_written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            warnings.warn(
                f"the training goes on without its log: cannot write {self._path}: "
                f"{error.strerror or error}",
                RuntimeWarning,
                stacklevel=4,
            )
            self._close()

    def _close(self) -> None:
        files = [file for file in (self._file, self._board) if file is not None]
        self._file = self._board = None
        for file in files:
            with suppress(OSError):  # of a row that could not be written, which was told
                file.close()


def _head(path: Path) -> bytes:
    """As many bytes as HEAD has, if there are; of what cannot be read none, which opening tells."""
    try:
        with open(path, "rb") as file:
            return file.read(len(HEAD))
    except OSError:
        return b""


def _rows(path: Path, start: int) -> list[dict[str, str]]:
    """The complete rows of a log before step ``start``."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    return [
        {name: row[name] for name in COLUMNS}
        for row in rows
        if all(row.get(name) is not None for name in COLUMNS)
        and row["step"].isdecimal()
        and int(row["step"]) < start
    ]
