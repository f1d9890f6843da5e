from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import pixels, png_chunk, save, truncated
from PIL import Image

from diffad_fast.data.image_files import read_image, read_mask
from diffad_fast.data.images import open_images
from diffad_fast.errors import InputError


def test_grey_file_at_its_own_size_keeps_every_value(tmp_path):
    array = pixels()
    found = read_image(save(tmp_path / "a.png", array), (40, 24), 1)
    assert found.dtype == np.uint8 and np.array_equal(found[0], array)


@pytest.mark.parametrize("shape", [(40, 24), (25, 101), (16, 16)])
@pytest.mark.parametrize("size", [(16, 16), (48, 20)])
def test_resizing_equals_antialiased_interpolation(tmp_path, shape, size):
    for dtype, tolerance in ((np.uint8, 2 / 255), (np.uint16, 2 / 65535), (np.float32, 1e-5)):
        array = pixels(1, shape, dtype)
        path = save(tmp_path / f"{np.dtype(dtype)}.tif", array)
        scale = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
        tensor = torch.from_numpy((array / scale).astype(np.float32))[None, None]
        expected = F.interpolate(tensor, size, mode="bilinear", antialias=True, align_corners=False)
        (batch,) = open_images(path, size, 1).batches(1)
        assert batch.x.shape == (1, 1, *size)
        assert (batch.x - expected).abs().max() <= tolerance


def test_sixteen_bit_grey_png(tmp_path):
    array = pixels(2, dtype=np.uint16)
    path = save(tmp_path / "a.png", array)
    found = read_image(path, (40, 24), 1)
    assert found.dtype == np.uint16 and np.array_equal(found[0], array)
    assert np.array_equal(read_image(path, (40, 24), 3), np.stack([array] * 3))
    (batch,) = open_images(path, (40, 24), 1).batches(1)
    assert torch.equal(batch.x[0, 0], torch.from_numpy(array / np.float32(65535)))


def test_integer_mode_is_sixteen_bit(tmp_path):
    array = pixels(2, dtype=np.uint16).astype(np.int32)
    found = read_image(save(tmp_path / "a.tif", array), (40, 24), 1)
    assert found.dtype == np.uint16 and np.array_equal(found[0], array)
    for value in (-1, 65536):
        array[0, 0] = value
        with pytest.raises(InputError, match=rf"b\.tif .*{value}.*16 bits"):
            read_image(save(tmp_path / "b.tif", array), (40, 24), 1)


def test_colour_grey_and_alpha(tmp_path):
    rgb = pixels(3, (40, 24, 3))
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    alpha = pixels(4, (40, 24, 1))
    paths = [
        save(tmp_path / "rgb.png", rgb),
        save(tmp_path / "rgba.png", np.concatenate([rgb, alpha], axis=2)),
        save(tmp_path / "cmyk.tif", Image.fromarray(rgb).convert("CMYK")),
    ]
    for path in paths:
        assert np.array_equal(read_image(path, (40, 24), 3), rgb.transpose(2, 0, 1))
        assert np.abs(read_image(path, (40, 24), 1)[0] - luma).max() <= 1
    grey = pixels(5)
    for image in (Image.fromarray(grey), Image.fromarray(np.dstack([grey, alpha]))):
        path = save(tmp_path / "grey.png", image)
        assert np.array_equal(read_image(path, (40, 24), 1)[0], grey)
        assert np.array_equal(read_image(path, (40, 24), 3), np.stack([grey] * 3))


def wide_png(colours) -> bytes:
    """Of colours (H,W,C) of 16 bits, which Pillow does not write."""
    height, width, channels = colours.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int, channels: int, data: bytes, **tags) -> bytes:
    """Uncompressed, in one strip, or in one for each channel where planes=2."""
    planes = tags.get("planes", 1)
    strips = channels if planes == 2 else 1
    entries = [(256, 3, [width]), (257, 3, [height]), (258, 3, [bits] * channels), (259, 3, [1]),
               (262, 3, [2 if channels == 3 else 1]), (273, 4, [0] * strips), (277, 3, [channels]),
               (278, 3, [height]), (279, 4, [len(data) // strips] * strips), (284, 3, [planes]),
               (339, 3, [tags.get("form", 1)] * channels)]  # fmt: skip
    place = 8 + 2 + 12 * len(entries) + 4
    sizes = [len(values) * {3: 2, 4: 4}[kind] for _, kind, values in entries]
    first = place + sum(size for size in sizes if size > 4)
    head, extra = struct.pack("<2sHIH", b"II", 42, 8, len(entries)), b""
    for tag, kind, values in entries:
        if tag == 273:
            values = [first + i * len(data) // strips for i in range(strips)]
        packed = struct.pack(f"<{len(values)}{'I' if kind == 4 else 'H'}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack("<I", place + len(extra)), extra + packed
        head += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return head + struct.pack("<I", 0) + extra + data


def test_colours_of_sixteen_bits_are_read_in_eight_with_a_warning(tmp_path):
    colours = pixels(2, (40, 24, 3), np.uint16)
    alpha = pixels(3, (40, 24, 1), np.uint16)
    (tmp_path / "a.png").write_bytes(wide_png(colours))
    (tmp_path / "b.png").write_bytes(wide_png(np.concatenate([colours, alpha], axis=2)))
    (tmp_path / "c.tif").write_bytes(tiff(24, 40, 16, 3, colours.astype("<u2").tobytes()))
    for path in sorted(tmp_path.iterdir()):
        with pytest.warns(UserWarning, match="16 bits are read in 8"):
            found = read_image(str(path), None, 3)
        assert np.array_equal(found, colours.transpose(2, 0, 1) >> 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(save(tmp_path / "d.png", (colours >> 8).astype(np.uint8)), None, 3)
        read_image(save(tmp_path / "e.png", colours[:, :, 0]), None, 3)


def test_what_pillow_reads_wrongly_is_refused(tmp_path):
    """Without the check both are read, as something else."""
    planes = pixels(2, (3, 40, 24), np.uint16).astype("<u2").tobytes()
    (tmp_path / "a.tif").write_bytes(tiff(24, 40, 16, 3, planes, planes=2))
    (tmp_path / "b.tif").write_bytes(tiff(24, 40, 8, 1, pixels(3).tobytes(), form=2))
    for name, reason in (("a", "16-bit values for each colour"), ("b", "signed values of 8 bits")):
        with pytest.raises(InputError, match=rf"^\S*{name}\.tif has .*{reason}"):
            read_image(str(tmp_path / f"{name}.tif"), None, 3)
    eight = pixels(4, (3, 40, 24))
    (tmp_path / "c.tif").write_bytes(tiff(24, 40, 8, 3, eight.tobytes(), planes=2))
    assert np.array_equal(read_image(str(tmp_path / "c.tif"), None, 3), eight)


def test_palette_is_looked_up(tmp_path):
    index = pixels(6) % 4
    colours = np.array([[250, 0, 0], [0, 130, 7], [1, 2, 255], [90, 90, 90]], np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    path = save(tmp_path / "p.png", image, transparency=bytes([0, 128, 255, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_image(path, (40, 24), 3), colours[index].transpose(2, 0, 1))


def test_one_bit_image_is_black_and_white(tmp_path):
    array = pixels(7) > 127
    found = read_image(save(tmp_path / "a.png", array), (40, 24), 1)
    assert np.array_equal(found[0], array * np.uint8(255))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_rotation(tmp_path, dtype):
    array = pixels(8, dtype=dtype)
    image = Image.fromarray(array)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to look at it
    path = save(tmp_path / "a.png", image, exif=exif)
    assert np.array_equal(read_image(path, (24, 40), 1)[0], np.rot90(array, -1))
    assert read_mask(None, path).shape == (24, 40)


def test_pillow_is_left_as_it_was(tmp_path):
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    truncated(tmp_path / "a.jpg")
    with pytest.raises(InputError):
        read_image(str(tmp_path / "a.jpg"), (8, 8), 1)
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before


def test_masks(tmp_path):
    image = save(tmp_path / "a.png", pixels())
    truth = pixels(1) > 200
    shade = truth * np.uint8(1)
    blue = np.zeros((40, 24, 3), np.uint8)
    blue[..., 2] = shade
    palette = Image.fromarray(1 - shade)
    palette.putpalette(bytes([9, 0, 0, 0, 0, 0]))
    for i, mask in enumerate([truth, shade, shade * 255, blue, palette, shade.astype(np.uint16)]):
        assert np.array_equal(read_mask(save(tmp_path / f"m{i}.png", mask), image), truth)
    other = save(tmp_path / "other.png", pixels(0, (24, 40)))
    with pytest.raises(InputError, match=r"other\.png is 40x24 .*a\.png is 24x40"):
        read_mask(other, image)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(InputError, match="text.png is not an image"):
        read_mask(str(tmp_path / "text.png"), image)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_turned_tiff_and_its_mask(tmp_path, compression):
    """Pillow turns some of them while it reads the pixels, and maps others as they lie."""
    shown = pixels(shape=(20, 30))
    stored = Image.fromarray(shown).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "a.tiff", compression=compression, tiffinfo={274: 6})
    Image.fromarray(shown > 99).save(tmp_path / "a_mask.png")
    path = str(tmp_path / "a.tiff")
    assert np.array_equal(read_image(path, None, 1)[0], shown)
    mask = read_mask(str(tmp_path / "a_mask.png"), path)
    assert np.array_equal(mask, shown > 99)
