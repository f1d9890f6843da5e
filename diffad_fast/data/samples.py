"""Samples from anywhere, as float32 batches: what all sources have in common, and the reading of
those that are decoded beside the computing.

At most about two batches are decoded ahead, whatever the number of samples.
"""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from ..errors import InputError, SkippedInput
from ..progress import progress

# Bytes: PyTorch keeps page-locked memory until the process ends.
LARGEST_PINNED = 1 << 28
_WORKERS = min(8, os.cpu_count() or 1)


class Batch(NamedTuple):
    """Some samples of a source.

    `x` on the CPU, float32, contiguous: images (n, C, H, W) in [0, 1], waves (n, samples), or
    vectors (n, D); `index` (n,) int64, the place of each sample in its source; `paths` n names, or
    None where the source is not files.
    """

    x: torch.Tensor
    index: torch.Tensor
    paths: list[str] | None


class Samples(ABC):
    """Samples of one source in the shape that a detector sees."""

    unit: str
    """What one of them is called."""
    columns: list[str] | None = None
    """The names of a table's columns, where it has any."""
    pinned = False
    """Whether decoded batches lie in page-locked memory, which goes to a GPU without waiting."""

    def __init__(self, opened_as: tuple, paths: list[str] | None = None):
        self.opened_as = opened_as
        """For which kind of detector, and in what shape."""
        self.paths = paths
        """The files' names as they were given; None where the source is not files."""
        self.skipped: list[tuple[str, str]] = []
        """(path, reason), as unusable files are met."""

    @property
    @abstractmethod
    def length(self) -> int | None:
        """How many there are, usable or not; None where that is not known yet."""

    @abstractmethod
    def load(self) -> Sequence[int]:
        """The indices of the usable ones."""

    @abstractmethod
    def batches(self, batch_size: int, indices: Iterable[int] | None = None) -> Iterator[Batch]:
        """Batches in the order of `indices` (default: all, in order)."""

    def check_normal(self) -> None:
        """Raise InputError for samples on which nothing can be fitted, as far as they tell."""
        return None


class Items(ABC):
    """Samples each of which is read by its index; several threads may do so."""

    paths: list[str] | None = None
    quick = False
    """Whether one is read sooner than a thread is started."""
    stored = False
    """Whether reading takes no memory: what is read lies there already."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Raises InputError for an unusable one."""


class DecodedSamples(Samples):
    """Samples that are read one by one, where reading takes long by threads beside the computing.

    `len` is `length`, or a TypeError where that is None.
    """

    def __init__(
        self,
        items: Items | None,
        opened_as: tuple,
        strict: bool = False,
        loader: Iterable[np.ndarray] | None = None,
    ):
        """Of `items`, or of what `loader` gives, in its order."""
        super().__init__(opened_as, None if items is None else items.paths)
        self._items = items
        self._loader = loader
        self._strict = strict
        self._unusable: set[int] = set()
        self._kept: dict[int, np.ndarray] | None = None
        self._usable: list[int] | None = None

    @property
    def length(self) -> int | None:
        """How many samples the source has, usable or not; None for a loader before `load`."""
        if self._items is not None:
            return len(self._items)
        return None if self._usable is None else len(self._usable)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"the number of {self.unit}s in a loader is not known before load()")
        return self.length

    def batches(self, batch_size: int, indices: Iterable[int] | None = None) -> Iterator[Batch]:
        """Batches of usable samples, in the order of `indices` (default: all, in order).

        Unusable files are left out, each with one warning; every batch but the last is full.
        Threads decode about two batches ahead and end with the iteration, however that ends; what
        needs no decoding is read without them.

        Raises:
            InputError: at the first unusable file if `strict`; at any unusable item of an array or
                loader; at the end if no sample at all was usable.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: it must be at least 1.")
        found: list[tuple[int, np.ndarray]] = []
        yielded = False
        for pair in self._decoded(indices, self._ahead(batch_size)):
            if found and not self._together(found, pair[1]):
                yield self._batch(found)
                found, yielded = [], True
            found.append(pair)
            if len(found) == batch_size:
                yield self._batch(found)
                found, yielded = [], True
        if found:
            yield self._batch(found)
        elif not yielded and indices is None:
            raise self._nothing_usable()

    @staticmethod
    def _ahead(batch_size: int) -> int:
        """How many are decoded ahead."""
        return 2 * batch_size

    @staticmethod
    def _together(found: list[tuple[int, np.ndarray]], item: np.ndarray) -> bool:
        """Whether an item may stand in a batch with those found before it."""
        return found[0][1].shape == item.shape

    def load(self, max_bytes: int = 4 << 30) -> list[int]:
        """Read everything once and return the indices of the usable samples.

        They stay in memory, in the type they were stored in, if they take up to `max_bytes`;
        otherwise `batches` reads again. What lies in memory as it is given is not copied.
        A loader is materialised, so that `batches` may ask for any order.

        Raises:
            InputError: as `batches`; or a loader's samples take more than `max_bytes`.
        """
        if self._usable is not None:
            return list(self._usable)
        usable: list[int] = []
        kept: dict[int, np.ndarray] | None = {}
        size = 0
        if self._items is not None and self._items.stored:
            kept = None
        for index, sample in progress(self._decoded(None, 64), self.length, "reading", self.unit):
            usable.append(index)
            if kept is None:
                continue
            kept[index] = sample
            size += sample.nbytes
            if size > max_bytes:
                if self._items is None:
                    raise InputError(
                        f"the loader's {self.unit}s take more than {max_bytes / 2**30:.3g} GiB "
                        "after resizing: give a folder or a list of files, which are read again "
                        "instead."
                    )
                kept = None
        if not usable:
            raise self._nothing_usable()
        self._usable, self._kept = usable, kept
        return list(usable)

    def _decoded(
        self, indices: Iterable[int] | None, ahead: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index, usable sample) in order, at most `ahead` (and one a thread) of them in flight.

        Where threads would cost more than the reading, or have nothing to do meanwhile, there are
        none.
        """
        if self._items is None and self._kept is None:
            if indices is not None:
                raise InputError(
                    f"a loader gives its {self.unit}s in its own order: call load() first."
                )
            yield from enumerate(self._loader)
            return
        wanted = map(int, range(len(self)) if indices is None else indices)
        if self._kept is not None:
            yield from ((i, self._kept[i]) for i in wanted if i not in self._unusable)
            return
        if self._items.quick or self._is_one(indices):
            for index in wanted:
                if index not in self._unusable:
                    yield from self._finished(index, partial(self._items.read, index))
            return
        pending: deque[tuple[int, Callable[[], np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="diffad-fast-decode")
        try:
            for index in wanted:
                if index in self._unusable:
                    continue
                pending.append((index, pool.submit(self._items.read, index).result))
                if len(pending) > max(ahead, _WORKERS):
                    yield from self._finished(*pending.popleft())
            while pending:
                yield from self._finished(*pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _is_one(self, indices: Iterable[int] | None) -> bool:
        """Whether a single item is asked for, as far as that can be told."""
        if indices is None:
            return len(self) == 1
        return isinstance(indices, Sized) and len(indices) == 1

    def _finished(
        self, index: int, read: Callable[[], np.ndarray]
    ) -> Iterator[tuple[int, np.ndarray]]:
        try:
            sample = read()
        except InputError as error:
            if self._strict or self.paths is None:
                raise
            if index not in self._unusable:  # it may have been asked for twice
                self._unusable.add(index)
                self.skipped.append((self.paths[index], str(error)))
                warnings.warn(f"left out: {error}", SkippedInput, stacklevel=2)
        else:
            yield index, sample

    def _batch(self, found: list[tuple[int, np.ndarray]]) -> Batch:
        shape = len(found), *found[0][1].shape
        pinned = self.pinned and 4 * math.prod(shape) <= LARGEST_PINNED
        x = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
        for out, (_, sample) in zip(x.numpy(), found, strict=True):
            if sample.dtype.kind == "u":
                np.divide(sample, np.iinfo(sample.dtype).max, out=out, dtype=np.float32)
            else:
                out[:] = sample
        index = [index for index, _ in found]
        paths = None if self.paths is None else [self.paths[i] for i in index]
        numbers = torch.tensor(index, dtype=torch.int64, device="cpu")
        return Batch(x, numbers, paths)

    def _nothing_usable(self) -> InputError:
        if not self.skipped:
            return InputError(
                f"the loader gave no {self.unit}: give one that has at least one batch."
            )
        return InputError(
            f"none of the {len(self)} {self.unit} files can be used, the first because "
            f"{self.skipped[0][1]}"
        )
