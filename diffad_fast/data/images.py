"""Images from anywhere, as float32 batches in [0, 1], decoded beside the computing.

`open_images` takes a folder, files, an array, a tensor or a loader of batches and gives `Images`,
whose `batches` streams them: at most about two batches are decoded ahead, whatever the number of
images. `read_image` alone decides what a usable image file is, `_usable` what usable values are.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch

from ..errors import InputError, SkippedInput
from ..progress import progress

__all__ = [
    "Batch",
    "Images",
    "TestImage",
    "encode_png",
    "mvtec_test",
    "mvtec_train",
    "open_images",
    "read_image",
    "read_mask",
]

# Formats that Pillow registers but cannot decode by itself (EPS would start Ghostscript).
_NOT_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_GREY_16 = {"I;16", "I;16L", "I;16B", "I;16N"}
_DTYPES = {"uint8", "uint16", "float16", "bfloat16", "float32", "float64"}
# Of data sets in the MVTec AD layout: what is in them is not all normal.
_TEST_FOLDERS = frozenset(("test", "ground_truth"))
_WORKERS = min(8, os.cpu_count() or 1)
# Interpolation leaves values such as 1.0000001; they are clipped instead of refused.
_ROUNDING = 1e-5


class Batch(NamedTuple):
    """Some samples of a source.

    `x` on the CPU, float32, contiguous: images (n, C, H, W) in [0, 1], or vectors (n, D); `index`
    (n,) int64, the place of each sample in its source; `paths` n names, or None where the source is
    not files.
    """

    x: torch.Tensor
    index: torch.Tensor
    paths: list[str] | None


class TestImage(NamedTuple):
    """One test image in the MVTec AD layout.

    `defect` is "good" or the name of the defect's folder; `mask_path` is the ground truth, None for
    a good image and where the data set has no masks.
    """

    __test__ = False  # pytest would collect the class by its name

    path: str
    defect: str
    mask_path: str | None


def open_images(
    source,
    image_size: tuple[int, int] | None,
    channels: int,
    *,
    strict: bool = False,
    smallest: tuple[int, int] = (1, 1),
) -> Images:
    """Open a source of images.

    Args:
        source: a folder (searched recursively, links to folders too, in sorted order; hidden files
            and suffixes that are no image's are ignored), one file, a list or tuple of files, an
            array or tensor (N, C, H, W) or (N, H, W), or anything that can be iterated more than
            once and gives batches: tensors, tuples or lists that begin with one, or dicts with the
            key "image". Such a batch may also be one image, (H, W), or (C, H, W) of several
            channels.
            Arrays are uint8, uint16, or floats in [0, 1].
        image_size: (height, width) to which every image is resized, ignoring its aspect; None
            keeps every image's own size, and images of different sizes stand in different batches.
        channels: channels of the result; files give 1 or 3.
        strict: raise `InputError` at the first unusable file instead of leaving it out with a
            `SkippedInput` warning. A single file is always needed.
        smallest: (height, width) in pixels, before resizing, of the smallest usable images.

    Raises:
        InputError: nothing is there, or it cannot be images of that many channels. Unusable values
            in an array or a loader raise while they are read.
    """
    size = None if image_size is None else (int(image_size[0]), int(image_size[1]))
    opened_as = "image", size, channels
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return Images(_ArrayItems(source, size, channels, smallest), None, strict, opened_as)
    if is_path(source):
        paths = _image_files(os.fsdecode(source))
        strict = strict or os.path.isfile(source)
    elif isinstance(source, (list, tuple)) and source and is_path(source[0]):
        for i, path in enumerate(source):
            if not is_path(path):
                kind = type(path).__name__
                raise InputError(f"the list of files holds a {kind} at {i}: {path!r}.")
        paths = [os.fsdecode(path) for path in source]
    elif isinstance(source, Iterable) and not isinstance(source, Iterator):
        if isinstance(source, Sequence) and len(source) == 0:
            raise InputError("the list of images is empty: give at least one file or batch.")
        if channels == 1 and isinstance(source, Sequence) and all(map(_may_be_colour, source)):
            raise InputError(
                f"the list holds arrays of shape {tuple(source[0].shape)}, each an image in colour "
                "or three in grey: convert the colours, or give grey images as (N, 1, H, W)."
            )
        return Images(None, _LoaderItems(source, size, channels, smallest), strict, opened_as)
    else:
        raise InputError(
            f"images cannot be read from a {type(source).__name__}: give a folder, files, an "
            "array, a tensor, or a loader that can be iterated more than once."
        )
    return Images(_FileItems(paths, size, channels, smallest), None, strict, opened_as)


class Images:
    """Images of one size from one source; made by `open_images`.

    `paths` holds the files' names as they were given, None for arrays and loaders. `skipped` is
    filled with (path, reason) as unusable files are met. `len` is `length`, or a TypeError where
    that is None.
    """

    unit = "image"
    columns = None

    def __init__(self, items, loader: _LoaderItems | None, strict: bool, opened_as: tuple):
        self.opened_as = opened_as
        """For which kind of detector, and in what shape."""
        self.paths: list[str] | None = getattr(items, "paths", None)
        self.skipped: list[tuple[str, str]] = []
        self._items = items
        self._loader = loader
        self.last: Batch | None = None
        """What `batches` gave last: to look at what was scored without reading it again."""
        self._strict = strict
        self._unusable: set[int] = set()
        self._kept: dict[int, np.ndarray] | None = None
        self._usable: list[int] | None = None

    @property
    def length(self) -> int | None:
        """How many images the source has, usable or not; None for a loader before `load`."""
        if self._items is not None:
            return len(self._items)
        return None if self._usable is None else len(self._usable)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of images in a loader is not known before load()")
        return self.length

    def check_normal(self) -> None:
        """Raise InputError for samples that are known to be no normal ones; of these nothing is."""

    def batches(self, batch_size: int, indices: Iterable[int] | None = None) -> Iterator[Batch]:
        """Batches of usable images, in the order of `indices` (default: all, in order).

        Unusable files are left out, each with one warning; every batch but the last is full.
        Threads decode about two batches ahead and end with the iteration, however that ends; what
        needs no decoding is read without them.

        Raises:
            InputError: at the first unusable file if `strict`; at any unusable item of an array or
                loader; at the end if no image at all was usable.
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
        """Read everything once and return the indices of the usable images.

        The resized images stay in memory, in the type they were stored in, if they take up to
        `max_bytes`; otherwise `batches` decodes again. Arrays that need no resizing are not copied.
        A loader is materialised, so that `batches` may ask for any order.

        Raises:
            InputError: as `batches`; or a loader's images take more than `max_bytes`.
        """
        if self._usable is not None:
            return list(self._usable)
        usable: list[int] = []
        kept: dict[int, np.ndarray] | None = {}
        size = 0
        if isinstance(self._items, _ArrayItems) and self._items.quick:
            kept = None
        for index, image in progress(self._decoded(None, 64), self.length, "reading", self.unit):
            usable.append(index)
            if kept is None:
                continue
            kept[index] = image
            size += image.nbytes
            if size > max_bytes:
                if self._items is None:
                    raise InputError(
                        f"the loader's images take more than {max_bytes / 2**30:.3g} GiB after "
                        "resizing: give a folder or a list of files, which are read again instead."
                    )
                kept = None
        if not usable:
            raise self._nothing_usable()
        self._usable, self._kept = usable, kept
        return list(usable)

    def _decoded(
        self, indices: Iterable[int] | None, ahead: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index, usable image) in order, at most `ahead` (and one a thread) of them in flight.

        Where threads would cost more than the reading, or have nothing to do meanwhile, there are
        none.
        """
        if self._items is None and self._kept is None:
            if indices is not None:
                raise InputError("a loader gives its images in its own order: call load() first.")
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
            image = read()
        except InputError as error:
            if self._strict or self.paths is None:
                raise
            if index not in self._unusable:  # it may have been asked for twice
                self._unusable.add(index)
                self.skipped.append((self.paths[index], str(error)))
                warnings.warn(f"left out: {error}", SkippedInput, stacklevel=2)
        else:
            yield index, image

    def _batch(self, found: list[tuple[int, np.ndarray]]) -> Batch:
        shape = len(found), *found[0][1].shape
        images = torch.empty(shape, dtype=torch.float32, device="cpu")
        for out, (_, image) in zip(images.numpy(), found, strict=True):
            if image.dtype.kind == "u":
                np.divide(image, np.iinfo(image.dtype).max, out=out, dtype=np.float32)
            else:
                out[:] = image
        index = [index for index, _ in found]
        paths = None if self.paths is None else [self.paths[i] for i in index]
        numbers = torch.tensor(index, dtype=torch.int64, device="cpu")
        self.last = Batch(images, numbers, paths)
        return self.last

    def _nothing_usable(self) -> InputError:
        if not self.skipped:
            return InputError("the loader gave no image: give one that has at least one batch.")
        return InputError(
            f"none of the {len(self)} {self.unit} files can be used, the first because "
            f"{self.skipped[0][1]}"
        )


def read_image(
    path: str, size: tuple[int, int] | None, channels: int, smallest: tuple[int, int] = (1, 1)
) -> np.ndarray:
    """Read one image file.

    Anything that Pillow decodes: 1, 8 or 16 bit, palette, CMYK, float in grey; the EXIF orientation
    is applied, alpha is dropped, grey is replicated to colour, and colour becomes grey by ITU-R
    601-2 luma. Of colours of 16 bits Pillow keeps the upper 8, and a warning says so. Only the
    first frame is read. Resized to `size` by the antialiased bilinear filter.

    Args:
        path: the file.
        size: (height, width) of the result; None keeps the image's own.
        channels: 1 or 3.
        smallest: (height, width) in pixels of the smallest image that is accepted.

    Returns:
        (channels, height, width) uint8, uint16 (16-bit grey), or float32 in [0, 1].

    Raises:
        InputError: missing, unreadable, damaged, no image, a decompression bomb (by Pillow's
            limit), constant, NaN or out of range, or smaller than `smallest`; the file is named.
    """
    with _opened(path) as image:
        _check_depth(image, path)
        image = _upright(image)
    _check_sides(image.height, image.width, smallest, path)
    if image.mode in _GREY_16 or image.mode in ("I", "F"):
        values = np.asarray(image)[None]
        if image.mode == "I":
            low, high = values.min(), values.max()
            if low < 0 or high > 65535:
                raise InputError(
                    f"{path} has values from {low} to {high}: integers must fit into 16 bits, so "
                    "convert it to 8 or 16 bit."
                )
        if image.mode != "F":
            values = values.astype(np.uint16)
    else:
        image = _grey_or_colour(image, path)
        if image.mode == "RGB" and channels == 1:
            image = image.convert("L")
        values = np.asarray(image)
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    values = _resized(_usable(values, path), size)
    if len(values) != channels:
        values = np.repeat(values, channels, axis=0)
    return np.ascontiguousarray(values)


def read_mask(path: str | None, image_path: str) -> np.ndarray:
    """Read the ground-truth mask of an image; all False where `path` is None.

    Returns:
        (h, w) bool, True where any channel is > 0, of the image's own size (after EXIF rotation).

    Raises:
        InputError: one of the files cannot be read, or their sizes differ.
    """
    with _opened(image_path) as image:
        # Orientations 5 to 8 of EXIF swap the sides, of some formats while the pixels are read.
        turned = 5 <= image.getexif().get(0x0112, 1) <= 8
        height, width = np.shape(_upright(image))[:2] if turned else image.size[::-1]
    if path is None:
        return np.zeros((height, width), dtype=bool)
    with _opened(path) as mask:
        mask = _upright(mask)
    if mask.size != (width, height):
        raise InputError(
            f"{path} is {mask.width}x{mask.height} pixels but its image {image_path} is "
            f"{width}x{height}: a mask must have the size of its image."
        )
    if mask.mode not in _GREY_16 and mask.mode not in ("I", "F"):
        mask = _grey_or_colour(mask, path)
    values = np.asarray(mask) > 0
    return values if values.ndim == 2 else values.any(axis=-1)


def encode_png(picture: np.ndarray) -> bytes:
    """(H,W,3) uint8 as the bytes of a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="png")
    return stream.getvalue()


def mvtec_train(root: str | bytes | os.PathLike) -> str:
    """What to train on of a folder: `root/train/good`, or all of `root` where that is not there.

    Raises:
        InputError: somewhere below it is a folder test or ground_truth.
    """
    root = os.fsdecode(root)
    good = os.path.join(root, "train", "good")
    folder = good if os.path.isdir(good) else root
    check_no_test(folder, "images")
    return folder


def check_no_test(root: str, samples: str) -> None:
    """Raise InputError if a folder test or ground_truth lies below `root`, or a link leads to one
    or into one: it is no training data.

    samples: what the detector sees, in the plural.
    """
    for folder, below, _ in _visible(root):
        for name in below:
            path, names = os.path.join(folder, name), [name]
            if os.path.islink(path):
                target = os.path.realpath(path)
                names += os.path.relpath(target, os.path.realpath(root)).split(os.sep)
                path = f"{path}, a link to {target},"
            if not _TEST_FOLDERS.isdisjoint(names):
                raise InputError(
                    f"{path} lies in {root}, and a detector is not trained on what it is tested "
                    f"on: give the folder of normal {samples}."
                )


def mvtec_test(root: str) -> list[TestImage]:
    """The test images of a data set in the MVTec AD layout, sorted by defect and name.

    Images are `root/test/<defect>/*`; masks are `root/ground_truth/<defect>/<stem>_mask.*` or
    `<stem>.*`. A data set without a folder `ground_truth` has no masks.

    Raises:
        InputError: there is no folder `test` with images in it, or a mask is missing.
    """
    root = os.fsdecode(root)
    test, truth = os.path.join(root, "test"), os.path.join(root, "ground_truth")
    if not os.path.isdir(test):
        raise InputError(
            f"{root} has no folder test: evaluation needs the MVTec AD layout, test/good and "
            "test/<defect> with masks in ground_truth/<defect>."
        )
    found: list[TestImage] = []
    for defect in sorted(os.listdir(test)):
        folder = os.path.join(test, defect)
        if defect.startswith(".") or not os.path.isdir(folder):
            continue
        need_mask = defect != "good" and os.path.isdir(truth)
        masks = _masks(os.path.join(truth, defect)) if need_mask else {}
        for name in sorted(filter(is_image, os.listdir(folder))):
            path, stem = os.path.join(folder, name), os.path.splitext(name)[0]
            mask = masks.get(f"{stem}_mask", masks.get(stem))
            if need_mask and mask is None:
                raise InputError(
                    f"{path} has no mask: {os.path.join(truth, defect, stem + '_mask.png')} is "
                    "missing; add it, or remove the whole folder ground_truth."
                )
            found.append(TestImage(path, defect, mask))
    if not found:
        raise InputError(f"{test} holds no images: it needs folders of images, such as test/good.")
    return found


def _masks(folder: str) -> dict[str, str]:
    names = sorted(filter(is_image, os.listdir(folder))) if os.path.isdir(folder) else []
    return {os.path.splitext(name)[0]: os.path.join(folder, name) for name in names}


class _FileItems:
    quick = False

    def __init__(
        self,
        paths: list[str],
        size: tuple[int, int],
        channels: int,
        smallest: tuple[int, int],
    ):
        if channels not in (1, 3):
            raise InputError(
                f"image files give 1 (grey) or 3 (colour) channels, not {channels}: give an array "
                f"(N, {channels}, H, W) instead."
            )
        self.paths = paths
        self._how = size, channels, smallest

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        return read_image(self.paths[index], *self._how)


class _ArrayItems:
    """Images of an array or tensor (N, C, H, W) or (N, H, W), each checked when it is read."""

    def __init__(
        self,
        array: np.ndarray | torch.Tensor,
        size: tuple[int, int],
        channels: int,
        smallest: tuple[int, int],
        first: int | None = None,
    ):
        shape = tuple(array.shape)
        if len(shape) not in (3, 4):
            raise InputError(
                f"an array of images has shape (N, C, H, W) or (N, H, W), not {shape}: reshape it."
            )
        found = shape[1] if len(shape) == 4 else 1
        if found != channels:
            hint = "convert the array, or choose the number of channels accordingly."
            if len(shape) == 4 and shape[3] == channels:
                hint = "its channels seem to be last, so transpose it to (N, C, H, W)."
            raise InputError(
                f"the array of shape {shape} has {found} channels instead of {channels}: {hint}"
            )
        if 0 in shape:
            raise InputError(f"the array of shape {shape} is empty: give at least one image.")
        dtype = getattr(array.dtype, "name", str(array.dtype)).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise InputError(
                f"images of dtype {dtype} have no known range: convert them to uint8 "
                "(0..255), uint16 (0..65535) or floats in [0, 1]."
            )
        _check_sides(*shape[-2:], smallest, "each image of the array")
        self.quick = size is None or shape[-2:] == size
        """Whether an item is read as it lies: sooner than a thread is started."""
        self._array = array
        self._size = size
        self._first = 0 if first is None else first
        self._name = "image {} of the " + ("array" if first is None else "loader")

    def __len__(self) -> int:
        return len(self._array)

    def read(self, index: int) -> np.ndarray:
        item = self._array[index]
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu()
            item = (item.float() if item.dtype == torch.bfloat16 else item).numpy()
        item = item if item.ndim == 3 else item[None]
        return _resized(_usable(item, self._name.format(self._first + index)), self._size)


class _LoaderItems:
    """The images of a loader, in its order; each iteration iterates the loader anew."""

    def __init__(
        self,
        loader: Iterable,
        size: tuple[int, int],
        channels: int,
        smallest: tuple[int, int],
    ):
        self._loader = loader
        self._how = size, channels, smallest

    def __iter__(self) -> Iterator[np.ndarray]:
        number = 0
        for batch in self._loader:
            images = _images_of(batch)
            if images.ndim == 2 or (images.ndim == 3 and self._how[1] > 1):
                images = images[None]
            items = _ArrayItems(images, *self._how, first=number)
            yield from map(items.read, range(len(items)))
            number += len(items)


def _images_of(batch) -> np.ndarray | torch.Tensor:
    images = batch
    if isinstance(batch, Mapping):
        images = batch.get("image")
    elif isinstance(batch, (list, tuple)) and batch:
        images = batch[0]
    if not isinstance(images, (np.ndarray, torch.Tensor)):
        kind = f"dict with the keys {list(batch)}" if isinstance(batch, Mapping) else type(batch)
        raise InputError(
            f"the loader gave a {getattr(kind, '__name__', kind)}: a batch is a tensor, a tuple or "
            'list that begins with one, or a dict whose "image" is one.'
        )
    return images


def _may_be_colour(item) -> bool:
    shape = getattr(item, "shape", ())
    return len(shape) == 3 and shape[0] == 3


def _usable(values: np.ndarray, name: str) -> np.ndarray:
    """`values` (C, H, W) as uint8, uint16 or float32 in [0, 1], unless they are of no use."""
    low, high = values.min(axis=(1, 2)), values.max(axis=(1, 2))
    if values.dtype.kind == "f":
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise InputError(f"{name} has NaN or infinite values: replace them or leave it out.")
        if low.min() < -_ROUNDING or high.max() > 1 + _ROUNDING:
            raise InputError(
                f"{name} has values from {low.min():.6g} to {high.max():.6g}: floats must lie in "
                "[0, 1], so rescale them, or give uint8 (0..255) or uint16 (0..65535)."
            )
        values = values.astype(np.float32, copy=False)
        if low.min() < 0 or high.max() > 1:
            values = values.clip(0, 1)
    if (low == high).all():
        raise InputError(f"{name} is constant, every pixel has one value: leave it out.")
    return values


def _resized(values: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """(C, h, w) to (C, *size), unless that is None, of the same dtype.

    By Pillow's antialiased bilinear filter.

    8-bit planes are filtered in Pillow's fixed point; others in float32, and 16-bit ones rounded.
    """
    if size is None or values.shape[1:] == size:
        return values
    from PIL import Image

    eight_bit = values.dtype == np.uint8
    planes = values if eight_bit else values.astype(np.float32, copy=False)
    out = np.empty((len(values), *size), dtype=planes.dtype)
    for plane, target in zip(planes, out, strict=True):
        image = Image.fromarray(np.ascontiguousarray(plane))
        target[:] = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    if eight_bit:
        return out
    return np.rint(out).astype(np.uint16) if values.dtype.kind == "u" else out.clip(0, 1)


@contextmanager
def _opened(path: str) -> Iterator:
    """Open an image file with Pillow, and turn whatever goes wrong with it into an InputError."""
    from PIL import Image, UnidentifiedImageError

    try:
        # By name Pillow maps some files into memory as they lie, whatever their orientation.
        with open(path, "rb") as file, Image.open(file, formats=_formats()[0]) as image:
            yield image
    except UnidentifiedImageError:
        raise InputError(
            f"{path} is not an image that Pillow can read: convert or remove it."
        ) from None
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path} is a decompression bomb or far too large ({error}): shrink it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # on damaged files decoders raise all kinds of exceptions
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(
                f"{path} cannot be read ({error.strerror}): check the path and its permissions."
            ) from error
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} is damaged ({reason}): replace or remove it.") from error


def _check_depth(image, path: str) -> None:
    """Of an image that is not decoded yet: warn of what Pillow leaves out of its values, and raise
    InputError for what it gives wrongly without a word."""
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits, form, planes = (tags.get(tag) for tag in (258, 339, 284))
    if bits == (8,) and form == (2,):
        raise InputError(
            f"{path} has signed values of 8 bits, which Pillow takes for unsigned ones: convert it "
            "to unsigned ones."
        )
    if image.mode not in ("RGB", "RGBA"):
        return
    if planes == 2 and max(bits) > 8 and len(image.tile) > 1:
        raise InputError(
            f"{path} has a plane of {max(bits)}-bit values for each colour, which Pillow reads "
            "wrongly: save the colours of a pixel side by side, or compressed."
        )
    if any(";16" in str(tile[3]) for tile in image.tile):
        # Without the file's name: Python shows a text once.
        warnings.warn(
            "colours of 16 bits are read in 8, which is all that Pillow gives: of values that fill "
            "a part of the 16 bits little is left; convert them to 8 bits over their whole range, "
            "or give an array of uint16.",
            stacklevel=3,
        )


def _upright(image):
    """The decoded pixels, turned as EXIF asks; they outlive the file."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _grey_or_colour(image, path: str):
    """An 8-bit image in mode L or RGB; alpha is dropped, a palette is looked up."""
    if image.mode in ("L", "RGB"):
        return image
    image.info.pop("transparency", None)  # alpha in another guise, which convert() would warn about
    try:
        return image.convert("L" if image.mode in ("1", "LA") else "RGB")
    except ValueError:
        raise InputError(
            f"{path} is of colour mode {image.mode}, which Pillow cannot convert: save it as RGB."
        ) from None


def _check_sides(height: int, width: int, smallest: tuple[int, int], name: str) -> None:
    if height < smallest[0] or width < smallest[1]:
        raise InputError(
            f"{name} is {width}x{height} pixels and the detector needs at least "
            f"{smallest[1]}x{smallest[0]}: use larger images; where overlap keeps images as they "
            "are, leave it out to have them resized."
        )


@cache
def _formats() -> tuple[list[str], frozenset[str]]:
    """The formats that Pillow can decode by itself, and the suffixes of their files."""
    from PIL import Image

    Image.preinit()  # first, so that common formats are tried first
    Image.init()
    formats = [name for name in Image.ID if name not in _NOT_RASTER]
    suffixes = {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in formats or name == "MPO"  # MPO is opened as JPEG
    }
    return formats, frozenset(suffixes)


def is_path(value) -> bool:
    """Whether it names a file or folder."""
    return isinstance(value, (str, bytes, os.PathLike))


def is_image(name: str) -> bool:
    """Whether a bare file name is visible and has an image's suffix."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _formats()[1]


def _image_files(source: str) -> list[str]:
    found = files_below(source, is_image)
    if not found:
        raise InputError(f"{source} holds no image files: give a folder with images in it.")
    return found


def _visible(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk``, without hidden folders, and links to folders are followed. A folder that is
    reached in several ways is seen once: by its own name, where it lies below ``root``."""
    seen, tops = set(), [root]
    while tops:
        links = []
        for top in tops:
            for folder, below, names in os.walk(top):
                status = os.stat(folder)
                place = status.st_dev, status.st_ino
                if place in seen:
                    below[:] = []
                    continue
                seen.add(place)
                below[:] = sorted(name for name in below if not name.startswith("."))
                yield folder, below, names
                paths = [os.path.join(folder, name) for name in below]
                links += [path for path in paths if os.path.islink(path)]
        tops = links


def files_below(source: str, wanted: Callable[[str], bool]) -> list[str]:
    """``source`` itself if it is a file, else the files below it whose bare names are wanted,
    sorted; hidden folders are left out, links to folders followed. Raises InputError if it is
    neither file nor folder."""
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        raise InputError(f"{source} is no file or folder: check the path.")
    found = []
    for folder, _, names in _visible(source):
        found += [os.path.join(folder, name) for name in names if wanted(name)]
    # Not pipes and devices, which would be waited for; broken links are named when they are read.
    return sorted(path for path in found if os.path.isfile(path) or os.path.islink(path))
