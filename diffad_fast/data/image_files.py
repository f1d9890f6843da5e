"""Image files: reading, writing, and what a usable image is.

`read_image` alone decides what a usable file is, `usable_pixels` what usable values are.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import numpy as np

from ..errors import InputError
from .folders import check_regular, is_open_file

# Formats that Pillow registers but cannot decode by itself (EPS would start Ghostscript).
_NOT_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_GREY_16 = {"I;16", "I;16L", "I;16B", "I;16N"}
# Interpolation leaves values such as 1.0000001; they are clipped instead of refused.
_ROUNDING = 1e-5


def read_image(
    source,
    size: tuple[int, int] | None,
    channels: int,
    smallest: tuple[int, int] = (1, 1),
    name: str | None = None,
) -> np.ndarray:
    """Read one image: a file, or what :func:`is_picture` knows.

    Anything that Pillow decodes: 1, 8 or 16 bit, palette, CMYK, float in grey; the EXIF orientation
    is applied, alpha is dropped, grey is replicated to colour, and colour becomes grey by ITU-R
    601-2 luma. Of colours of 16 bits Pillow keeps the upper 8, and a warning says so. Only the
    first frame is read. Resized to `size` by the antialiased bilinear filter.

    Args:
        source: the file's path, or the picture.
        size: (height, width) of the result; None keeps the image's own.
        channels: 1 or 3.
        smallest: (height, width) in pixels of the smallest image that is accepted.
        name: what errors call a picture that has no path.

    Returns:
        (channels, height, width) uint8, uint16 (16-bit grey), or float32 in [0, 1].

    Raises:
        InputError: missing, unreadable, damaged, no image, a decompression bomb (by Pillow's
            limit), constant, NaN or out of range, or smaller than `smallest`; the file is named.
    """
    path = source if name is None else name
    with _opened(source, path) as image:
        _check_depth(image, path)
        image = _upright(image)
    check_sides(image.height, image.width, smallest, path)
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
            _check_grey(image)
            image = image.convert("L")
        values = np.asarray(image)
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    values = resized(usable_pixels(values, path), size)
    if len(values) != channels:
        values = np.repeat(values, channels, axis=0)
    return np.ascontiguousarray(values)


def read_mask(path: str | None, image_path: str) -> np.ndarray:
    """Read the ground-truth mask of an image; all False where `path` is None.

    Args:
        path: the mask's file, or a folder of masks: what is True in one of them is.
        image_path: the image.

    Returns:
        (h, w) bool, True where any channel is > 0, of the image's own size (after EXIF rotation).

    Raises:
        InputError: one of the files cannot be read, their sizes differ, or the folder is empty.
    """
    with _opened(image_path, image_path) as image:
        # Orientations 5 to 8 of EXIF swap the sides, of some formats while the pixels are read.
        turned = 5 <= image.getexif().get(0x0112, 1) <= 8
        height, width = np.shape(_upright(image))[:2] if turned else image.size[::-1]
    found = np.zeros((height, width), dtype=bool)
    for file in _mask_files(path):
        found |= _one_mask(file, found.shape, image_path)
    return found


def _mask_files(path: str | None) -> list[str]:
    if path is None:
        return []
    if not os.path.isdir(path):
        return [path]
    names = sorted(filter(is_image, os.listdir(path)))
    if not names:
        raise InputError(f"{path} holds no masks: add them, or leave out their image.")
    return [os.path.join(path, name) for name in names]


def _one_mask(path: str, shape: tuple[int, int], image_path: str) -> np.ndarray:
    height, width = shape
    with _opened(path, path) as mask:
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


def is_image(name: str) -> bool:
    """Whether a bare file name is visible and has an image's suffix."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _formats()[1]


def usable_pixels(values: np.ndarray, name: str) -> np.ndarray:
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


def resized(values: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
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


def check_sides(height: int, width: int, smallest: tuple[int, int], name: str) -> None:
    if height < smallest[0] or width < smallest[1]:
        raise InputError(
            f"{name} is {width}x{height} pixels and the detector needs at least "
            f"{smallest[1]}x{smallest[0]}: use larger images; where overlap keeps images as they "
            "are, leave it out to have them resized."
        )


def is_picture(value) -> bool:
    """Whether it is an image that is no array and no path: one of Pillow's, or an open file."""
    pillow = sys.modules.get("PIL.Image")  # who has one of its images has loaded it
    return is_open_file(value) or (pillow is not None and isinstance(value, pillow.Image))


@contextmanager
def _opened(source, path: str) -> Iterator:
    """Open an image with Pillow, and turn whatever goes wrong with it into an InputError; `path` is
    what that calls it."""
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(source, Image.Image):
            yield source
            return
        with ExitStack() as stack:
            if is_open_file(source):
                file = source
                file.seek(0)  # every reading begins anew
            else:
                check_regular(source)
                # By name Pillow maps some files into memory as they lie, however oriented.
                file = stack.enter_context(open(source, "rb"))
            yield stack.enter_context(Image.open(file, formats=_formats()[0]))
    except UnidentifiedImageError:
        raise InputError(
            f"{path} is not an image that Pillow can read: convert or remove it."
        ) from None
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path} is a decompression bomb or far too large ({error}): shrink it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from None
    except io.UnsupportedOperation as error:
        raise InputError(
            f"{path} is a file that cannot be read again ({error}): give io.BytesIO of its content."
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
    # One that was not opened from a file has no tiles.
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        # Without the file's name: Python shows a text once.
        warnings.warn(
            "colours of 16 bits are read in 8, which is all that Pillow gives: of values that fill "
            "a part of the 16 bits little is left; convert them to 8 bits over their whole range, "
            "or give an array of uint16.",
            stacklevel=3,
        )


def _check_grey(image) -> None:
    """Warn, once, where a colour image that becomes grey has colours."""
    sample = np.asarray(image.resize((32, 32), 0), dtype=np.int16)
    if (np.ptp(sample, axis=2) > 48).mean() > 0.1:
        warnings.warn(
            "colour images are read in grey, and what differs in colour alone cannot be seen: pass "
            "channels=3, --channels 3 in a shell, where colours matter.",
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
