"""Files and folders of results, written whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

_LONGEST_NAME = 255  # bytes, in the file systems of Linux


def with_end(name: str, end: str) -> str:
    """``name`` with ``end`` after it; where that is too long for a file, its beginning with a mark
    that is of the whole name."""
    if len(os.fsencode(name + end)) > _LONGEST_NAME:
        end = f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{end}"
        while len(os.fsencode(name + end)) > _LONGEST_NAME:
            name = name[:-1]
    return name + end


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write to a temporary name in the same folder, flush to the disk, then rename.

    Whoever reads ``path``, at any moment and after any crash, finds the old content or the new.
    Of a symbolic link it is the file behind it. Raises InputError where the folder is missing or
    not writable, or the disk is full.
    """
    given, path = path, Path(os.path.realpath(path))
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(f"cannot write {given}: {error.strerror}") from None
    finally:
        if temporary is not None:  # another process may have taken it for a leftover
            Path(temporary).unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what a process that was killed while it wrote ``path`` has left beside it."""
    path = Path(os.path.realpath(path))
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}"):
        leftover.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Raise InputError if a file could not be written at ``path``; leaves nothing behind."""
    given, path = path, Path(os.path.realpath(path))
    if path.is_dir():
        raise InputError(f"cannot write {given}: it is a folder; give a file name")
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        os.unlink(temporary)
    except OSError as error:
        raise InputError(f"cannot write {given}: {error.strerror}") from None


@contextmanager
def result_folder(path: str | os.PathLike, *stale: str) -> Iterator[Path]:
    """A temporary folder whose entries move to the folder ``path`` when the block ends well.

    ``path`` is made if it is missing; entries of the same names in it are replaced, those named
    ``stale`` go, others stay. After an exception nothing is left behind. Raises InputError where
    ``path`` cannot be written, in the block too.
    """
    path = Path(path)
    parent = _existing_parent(path)
    try:
        staged = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}."))
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None
    try:
        yield staged
        path.mkdir(parents=True, exist_ok=True)
        for name in sorted({entry.name for entry in staged.iterdir()}.union(stale)):
            old, new = path / name, staged / name
            if old.is_dir() or (old.exists() and not new.exists()):  # no renaming replaces a folder
                old.rename(staged / f"old.{name}")
            if new.exists():
                new.replace(old)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_result_folder(path: str | os.PathLike) -> None:
    """Raise InputError if :func:`result_folder` could not write there; leaves nothing behind."""
    path = Path(path)
    try:
        os.rmdir(tempfile.mkdtemp(dir=_existing_parent(path), prefix=f".{path.name}."))
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None


def _existing_parent(path: Path) -> Path:
    """``path`` or the nearest folder above it that exists."""
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            return folder
        if folder.exists() or folder.is_symlink():
            raise InputError(f"cannot write to {path}: {folder} is not a folder")
    raise InputError(f"cannot write to {path}: no folder above it exists")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
