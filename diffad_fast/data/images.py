"""Images from anywhere, as float32 batches in [0, 1].

`open_images` takes a folder, files, an array, a tensor or a loader of batches and gives `Images`,
whose `batches` streams them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch.utils.data import default_collate, default_convert

from ..arrays import check_unmasked, to_numpy
from ..errors import InputError
from .folders import files_below, is_path
from .image_files import (
    check_sides,
    is_image,
    is_picture,
    read_image,
    resized,
    usable_pixels,
)
from .samples import DecodedSamples, Items

_DTYPES = {"uint8", "uint16", "float16", "bfloat16", "float32", "float64"}


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
            and suffixes that are no image's are ignored, and folders of masks, ground_truth), one
            file, a list or tuple of files, an array or tensor (N, C, H, W) or (N, H, W), or
            anything that can be iterated more than once and gives batches: tensors, tuples or lists
            that begin with one, or dicts with the key "image". Such a batch may also be one image,
            (H, W), or (C, H, W) of several channels; a list of several such is refused. In place of
            a file there may be an image of Pillow's or an open binary file, such as io.BytesIO of
            what arrived at a service; one that cannot be used raises.
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
        return Images(_ArrayItems(source, size, channels, smallest), opened_as)
    for item in source if isinstance(source, (list, tuple)) else [source]:
        if isinstance(item, bytearray) or (isinstance(item, bytes) and 0 in item):
            # As paths they could name any file, so bytes are never taken for an image's content.
            raise InputError("these bytes are no path: give an image's content as io.BytesIO(...).")
    if is_picture(source):
        source = [source]
    if is_path(source):
        paths = _image_files(os.fsdecode(source))
        strict = strict or os.path.isfile(source)
    elif isinstance(source, (list, tuple)) and source and _is_file(source[0]):
        for i, file in enumerate(source):
            if not _is_file(file):
                kind = type(file).__name__
                raise InputError(f"the list of files holds a {kind} at {i}: {file!r}.")
        if any(map(is_picture, source)):
            return Images(_PictureItems(source, size, channels, smallest), opened_as)
        paths = [os.fsdecode(path) for path in source]
    elif isinstance(source, Iterable) and not isinstance(source, Iterator):
        if isinstance(source, Sequence) and len(source) == 0:
            raise InputError("the list of images is empty: give at least one file or batch.")
        if channels == 1 and isinstance(source, Sequence) and all(map(_may_be_colour, source)):
            raise InputError(
                f"the list holds arrays of shape {tuple(source[0].shape)}, each an image in colour "
                "or three in grey: convert the colours, or give grey images as (N, 1, H, W)."
            )
        return Images(None, opened_as, loader=_LoaderItems(source, size, channels, smallest))
    else:
        raise InputError(
            f"images cannot be read from a {type(source).__name__}: give a folder, files, an "
            "array, a tensor, or a loader that can be iterated more than once."
        )
    return Images(_FileItems(paths, size, channels, smallest), opened_as, strict)


class Images(DecodedSamples):
    """Images of one size from one source; made by `open_images`."""

    unit = "image"


def _is_file(value) -> bool:
    return is_picture(value) or is_path(value)


class _FileItems(Items):
    def __init__(
        self,
        paths: list[str] | None,
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


class _PictureItems(_FileItems):
    """Pictures, or files among them, which go by their places then."""

    def __init__(self, pictures: Sequence, *how):
        super().__init__(None, *how)
        self._pictures = list(pictures)
        # One that comes twice in a list has one position in its file, for all threads.
        self._turns = {id(p): threading.Lock() for p in self._pictures if is_picture(p)}

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, index: int) -> np.ndarray:
        name = "the image" if len(self) == 1 else f"image {index} of the list"
        picture = self._pictures[index]
        with self._turns.get(id(picture)) or nullcontext():
            return read_image(picture, *self._how, name=name)


class _ArrayItems(Items):
    """Images of an array or tensor (N, C, H, W) or (N, H, W), each checked when it is read."""

    def __init__(
        self,
        array: np.ndarray | torch.Tensor,
        size: tuple[int, int],
        channels: int,
        smallest: tuple[int, int],
        first: int | None = None,
    ):
        source = "array" if first is None else "loader"
        check_unmasked(array, f"the {source} has", "fill them, or leave out their images.")
        shape = tuple(array.shape)
        if len(shape) not in (3, 4):
            raise InputError(
                f"an array of images has shape (N, C, H, W) or (N, H, W), not {shape}: reshape it."
            )
        if len(shape) == 3 and channels == 1 and shape[2] in (3, 4):
            raise InputError(
                f"the array of shape {shape} seems to be one image in colour, (H, W, C): give it "
                "as (1, C, H, W) to a detector of so many channels, or convert the colours."
            )
        found = shape[1] if len(shape) == 4 else 1
        if found != channels:
            hint = "convert the array, or choose the number of channels accordingly."
            if len(shape) == 3 and channels in (shape[0], shape[2]):
                hint = "one image is to have the shape (1, C, H, W)."
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
        check_sides(*shape[-2:], smallest, "each image of the array")
        self.quick = self.stored = size is None or shape[-2:] == size
        self._array = array
        self._size = size
        self._first = 0 if first is None else first
        self._name = f"image {{}} of the {source}"

    def __len__(self) -> int:
        return len(self._array)

    def read(self, index: int) -> np.ndarray:
        item = self._array[index]
        if isinstance(item, torch.Tensor):
            item = to_numpy(item)
        item = item if item.ndim == 3 else item[None]
        return resized(usable_pixels(item, self._name.format(self._first + index)), self._size)


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
        # These make lists of the tuples of a dataset, as of an image and its mask.
        known = getattr(self._loader, "collate_fn", None) in (default_collate, default_convert)
        for batch in self._loader:
            images = _images_of(batch, self._how[1], may_be_images=not known)
            if images.ndim == 2 or (images.ndim == 3 and self._how[1] > 1):
                images = images[None]
            items = _ArrayItems(images, *self._how, first=number)
            for item in map(items.read, range(len(items))):
                # Of its own memory: a loader may fill its batch anew, and a worker's batch takes a
                # file descriptor as long as anything lies in it.
                yield item if item.flags.owndata else item.copy()
            number += len(items)


def _images_of(batch, channels: int, may_be_images: bool) -> np.ndarray | torch.Tensor:
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
    if may_be_images and isinstance(batch, list) and _are_images(batch, channels):
        raise InputError(
            f"the loader gave a list of {len(batch)} images: stack a batch to one array "
            "(N, C, H, W), or yield its images one by one; what is no image, as a mask, may stand "
            "beside one in a tuple."
        )
    return images


def _are_images(items: list, channels: int) -> bool:
    """Whether each of several is one image, as a loader gives them that stacks nothing."""
    first = items[0]
    one = first.ndim == 2 or (first.ndim == 3 and (channels > 1 or first.shape[0] == 1))
    alike = (
        isinstance(item, (np.ndarray, torch.Tensor))
        and (item.ndim, item.dtype) == (first.ndim, first.dtype)
        and item.shape[:-2] == first.shape[:-2]
        for item in items
    )
    return one and len(items) > 1 and all(alike)


def _may_be_colour(item) -> bool:
    shape = getattr(item, "shape", ())
    return len(shape) == 3 and shape[0] == 3


def _image_files(source: str) -> list[str]:
    found = files_below(source, is_image)
    if not found:
        raise InputError(f"{source} holds no image files: give a folder with images in it.")
    return found
