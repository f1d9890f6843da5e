from __future__ import annotations

import io
import os
import shutil
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import diffad_fast as daf
from diffad_fast.data import samples
from diffad_fast.data.folders import check_no_test, files_below
from diffad_fast.data.image_files import read_image, read_mask
from diffad_fast.data.images import open_images
from diffad_fast.data.mvtec import mvtec_test, mvtec_train
from diffad_fast.errors import InputError, SkippedInput


def pixels(seed=0, shape=(40, 24), dtype=np.uint8):
    """A smooth but not constant picture over the whole range of the dtype."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def save(path: Path, array, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return str(path)


def folder_of(tmp_path: Path, number: int) -> Path:
    for i in range(number):
        save(tmp_path / "good" / f"{i:03d}.png", pixels(i))
    return tmp_path / "good"


def everything(images, batch_size=4, indices=None):
    batches = list(images.batches(batch_size, indices))
    return torch.cat([b.x for b in batches]), torch.cat([b.index for b in batches]).tolist()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than its few bytes hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


# --- what a file's pixels become


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


def test_files_and_arrays_give_the_same(tmp_path):
    for dtype in (np.uint8, np.uint16, np.float32):
        array = np.stack([pixels(i, dtype=dtype) for i in range(3)])
        paths = [save(tmp_path / f"{i}.tif", a) for i, a in enumerate(array)]
        from_files, _ = everything(open_images(paths, (16, 16), 1))
        for source in (array, array[:, None], torch.from_numpy(array)):
            assert torch.equal(everything(open_images(source, (16, 16), 1))[0], from_files)


# --- sources


def test_folder_is_searched_in_order(tmp_path):
    for name in ("b/2.png", "b/10.PNG", "a.jpeg", ".hidden.png", ".cache/x.png", "c/d/e.tiff"):
        save(tmp_path / name, pixels())
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "table.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    images = open_images(tmp_path, (16, 16), 1)
    names = ["a.jpeg", "b/10.PNG", "b/2.png", "c/d/e.tiff"]
    assert images.paths == [str(tmp_path / name) for name in names]
    (batch,) = images.batches(8)
    assert batch.paths == images.paths and batch.index.tolist() == [0, 1, 2, 3]
    assert batch.index.dtype == torch.int64 and batch.x.dtype == torch.float32
    assert batch.x.is_contiguous() and len(images) == images.length == 4


def test_names_are_kept_as_given(tmp_path, monkeypatch):
    save(tmp_path / "x" / "a.png", pixels())
    monkeypatch.chdir(tmp_path)
    assert open_images("x", (8, 8), 1).paths == ["x/a.png"]
    assert open_images([Path("x/a.png")], (8, 8), 1).paths == ["x/a.png"]


def test_names_may_be_bytes(tmp_path):
    path = save(tmp_path / "x" / "a.png", pixels())
    for source in (tmp_path / "x", path, [path]):
        as_bytes = [os.fsencode(path)] if isinstance(source, list) else os.fsencode(source)
        assert open_images(as_bytes, (8, 8), 1).paths == [str(path)]
    (found,) = mvtec_test(os.fsencode(mvtec(tmp_path / "set")))[:1]
    assert found.path == str(tmp_path / "set/test/good/0.png")
    with pytest.raises(InputError, match="^nowhere is no file or folder"):
        open_images(b"nowhere", (8, 8), 1)


def test_any_order_from_disk_and_from_memory(tmp_path):
    folder = folder_of(tmp_path, 9)
    order = [7, 0, 3, 3, 8, 1]
    expected = torch.stack([torch.from_numpy(pixels(i) / np.float32(255))[None] for i in range(9)])
    from_disk, memory, too_large = (open_images(folder, (40, 24), 1) for _ in range(3))
    assert memory.load() == list(range(9))
    assert too_large.load(max_bytes=3 * 40 * 24) == list(range(9))
    for path in folder.iterdir():  # what was kept needs no files
        path.rename(path.with_suffix(".moved"))
    assert torch.equal(everything(memory)[0], expected)
    for path in folder.iterdir():
        path.rename(path.with_suffix(".png"))
    for images in (from_disk, memory, too_large):
        for indices in (order, np.array(order), torch.tensor(order)):
            found, index = everything(images, 4, indices)
            assert index == order and torch.equal(found, expected[order])
        assert [len(b.index) for b in images.batches(4)] == [4, 4, 1]
    (tmp_path / "good" / "000.png").unlink()
    assert torch.equal(everything(memory)[0], expected)
    with pytest.warns(SkippedInput, match="000.png"):
        everything(too_large)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_loader(kind):
    array = torch.rand(10, 3, 12, 12)
    collate = {
        "tensor": lambda items: torch.stack([x for x, _ in items]),
        "tuple": None,
        "dict": lambda items: {"label": 0, "image": torch.stack([x for x, _ in items])},
    }[kind]
    loader = DataLoader(TensorDataset(array, torch.arange(10)), batch_size=3, collate_fn=collate)
    images = open_images(loader, (12, 12), 3)
    assert images.length is None and images.paths is None
    with pytest.raises(TypeError):
        len(images)
    assert [len(b.index) for b in images.batches(4)] == [4, 4, 2]
    found, index = everything(images)
    assert torch.equal(found, array) and index == list(range(10))
    with pytest.raises(InputError, match="load"):
        next(images.batches(2, [1, 0]))
    assert images.load() == list(range(10)) and len(images) == 10
    found, index = everything(images, 3, [9, 2, 5])
    assert torch.equal(found, array[[9, 2, 5]]) and index == [9, 2, 5]


def test_list_of_batches_and_what_is_no_source():
    batches = [torch.rand(2, 8, 8), torch.rand(3, 8, 8)]
    assert torch.equal(everything(open_images(batches, (8, 8), 1))[0][:, 0], torch.cat(batches))
    grey, colour = [torch.rand(8, 9) for _ in range(3)], [torch.rand(3, 8, 9) for _ in range(2)]
    assert torch.equal(everything(open_images(grey, (8, 9), 1))[0][:, 0], torch.stack(grey))
    assert torch.equal(everything(open_images(colour, (8, 9), 3))[0], torch.stack(colour))
    with pytest.raises(InputError, match=r"shape \(3, 8, 9\), each an image in colour or three"):
        open_images(colour, (8, 9), 1)
    for source in (iter(batches), 7, None):
        with pytest.raises(InputError, match="cannot be read from a"):
            open_images(source, (8, 8), 1)
    with pytest.raises(InputError, match="empty"):
        open_images([], (8, 8), 1)
    with pytest.raises(InputError, match="no image"):
        list(open_images(DataLoader([]), (8, 8), 1).batches(2))
    with pytest.raises(InputError, match=r"\['picture'\]"):
        list(open_images([{"picture": batches[0]}], (8, 8), 1).batches(2))
    with pytest.raises(InputError, match="gave a list"):
        list(open_images([["a.png"]], (8, 8), 1).batches(2))
    with pytest.raises(InputError, match="image 3 of the loader .*NaN"):
        list(open_images([batches[1], torch.full((2, 8, 8), np.nan)], (8, 8), 1).batches(9))
    with pytest.raises(InputError, match="GiB"):
        open_images([torch.rand(4, 8, 8)], (8, 8), 1).load(max_bytes=500)


# --- decoding ahead


def decoding_threads():
    return [t for t in threading.enumerate() if t.name.startswith("diffad-fast-decode")]


def test_look_ahead_is_bounded_and_threads_end(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, 60)
    asked = []

    class Pool(samples.ThreadPoolExecutor):
        def submit(self, function, index):
            asked.append(index)
            return super().submit(function, index)

    monkeypatch.setattr(samples, "_WORKERS", 3)
    monkeypatch.setattr(samples, "ThreadPoolExecutor", Pool)
    batches = open_images(folder, (16, 16), 1).batches(5)
    assert not asked and not decoding_threads()
    for number in range(1, 4):
        next(batches)
        assert 5 * number + 5 <= len(asked) <= 5 * number + 10 + 1
    assert decoding_threads()
    batches.close()
    assert not decoding_threads()
    for _ in open_images(folder, (16, 16), 1).batches(7):
        break
    assert len(list(open_images(folder, (16, 16), 1).batches(7))) == 9
    assert not decoding_threads()


def test_what_needs_no_decoding_starts_no_threads(tmp_path, monkeypatch):
    started = []

    class Pool(samples.ThreadPoolExecutor):
        def __init__(self, *args, **options):
            started.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr(samples, "ThreadPoolExecutor", Pool)
    array = pixels(0, (5, 1, 16, 16))
    folder = folder_of(tmp_path, 3)
    for source, size, indices, threads in (
        (array, (16, 16), None, 0), (array, (16, 16), [3, 1], 0), (array, None, None, 0),
        (array, (8, 8), None, 1), (array, (8, 8), [4], 0), (array[:1], (8, 8), None, 0),
        (folder, (8, 8), None, 1), (folder, (8, 8), [2], 0), (folder / "001.png", (8, 8), None, 0),
        (folder, (8, 8), iter([2]), 1),
    ):  # fmt: skip
        started.clear()
        images = open_images(source, size, 1)
        wanted = range(len(images)) if indices is None else list(indices)
        given = iter(wanted) if hasattr(indices, "__next__") else indices
        assert everything(images, 2, given)[1] == list(wanted)
        assert len(started) == threads, (source, size, indices)
    (folder / "001.png").write_bytes(b"")
    images = open_images(folder, (8, 8), 1)
    with pytest.warns(SkippedInput, match="left out: .*001.png"):
        assert list(images.batches(1, [1])) == []
    assert [path for path, _ in images.skipped] == [str(folder / "001.png")]
    save(folder / "001.png", pixels())  # left out once, it stays out
    assert list(images.batches(1, [1])) == []


def test_an_error_of_the_consumer_ends_the_threads(tmp_path):
    folder = folder_of(tmp_path, 20)

    def consume():
        for _ in open_images(folder, (16, 16), 1).batches(2):
            raise RuntimeError("the consumer fails")

    with pytest.raises(RuntimeError):
        consume()
    assert not decoding_threads()


def test_arrays_are_read_lazily_and_not_copied(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (50, 1, 8, 8))
    array[:] = pixels(0, array.shape)
    array[40] = 7
    batches = open_images(array, (8, 8), 1).batches(4)
    assert torch.equal(next(batches).x * 255, torch.from_numpy(array[:4].astype(np.float32)))
    array[40] = pixels(1, (1, 8, 8))
    images = open_images(array, (8, 8), 1)
    assert len(images.load()) == 50 and images._kept is None


# --- bad files


def truncated(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(0, (200, 200))).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[:2000])


def truncated_png(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(0, (200, 200))).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue()[:2000])


POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
FLAT = np.full((40, 40, 3), (1, 2, 3), np.uint8)
BAD_FILES = {
    "truncated.jpg": (truncated, "is damaged"),
    "truncated.png": (truncated_png, "is damaged"),
    "text.png": (lambda path: path.write_text("I am a text"), "is not an image"),
    "postscript.png": (lambda path: path.write_text(POSTSCRIPT), "is not an image"),
    "empty.png": (lambda path: path.write_bytes(b""), "is not an image"),
    "bomb.png": (lambda path: path.write_bytes(png_claiming(40000, 40000)), "bomb or far"),
    "constant.png": (lambda path: save(path, np.full((40, 40), 9, np.uint8)), "is constant"),
    "colour.png": (lambda path: save(path, FLAT), "is constant"),
    "deep.png": (lambda path: save(path, np.full((40, 40), 900, np.uint16)), "is constant"),
    "tiny.png": (lambda path: save(path, pixels(0, (10, 12))), "is 12x10 .* at least 16x16"),
    "nan.tif": (lambda path: save(path, np.full((40, 40), np.nan, np.float32)), "NaN or infinite"),
    "inf.tif": (lambda path: save(path, pixels(0, (40, 40), np.float32) / 0), "NaN or infinite"),
    "range.tif": (lambda path: save(path, 9 * pixels(0, (40, 40), np.float32)), r"\[0, 1\]"),
    "folder.png": (lambda path: path.mkdir(), "cannot be read"),
    "gone.png": (lambda path: path.symlink_to("nowhere.png"), "cannot be read"),
}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_among_good_ones(tmp_path, name):
    folder = folder_of(tmp_path, 3)
    make, reason = BAD_FILES[name]
    make(folder / name)
    # A folder or a dangling link is met only when it is named.
    files = sorted(map(str, folder.iterdir()))
    bad = files.index(str(folder / name))
    images = open_images(files, (16, 16), 1, smallest=(16, 16))
    with pytest.warns(SkippedInput, match=reason) as seen:
        found, index = everything(images, 2)
    assert len(seen) == 1 and name in str(seen[0].message)
    assert index == [i for i in range(4) if i != bad] and len(found) == 3
    (skipped,) = images.skipped
    assert skipped[0] == files[bad] and name in skipped[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each file is named once
        assert everything(images)[1] == images.load() == index
        assert everything(images, 2, range(4))[1] == index
    with pytest.raises(InputError, match=reason):
        everything(open_images(files, (16, 16), 1, strict=True, smallest=(16, 16)))
    with pytest.raises(InputError, match=reason):
        open_images(files, (16, 16), 1, strict=True, smallest=(16, 16)).load()
    with pytest.raises(InputError, match=reason), warnings.catch_warnings():
        warnings.simplefilter("error")
        everything(open_images(files[bad : bad + 1], (16, 16), 1, strict=True, smallest=(16, 16)))
    assert not decoding_threads()


def test_no_permission(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", pixels())

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match=r"a\.png cannot be read \(Permission denied\)"):
        read_image(path, (8, 8), 1)


def test_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match="holds no image files"):
        open_images(tmp_path, (16, 16), 1)
    with pytest.raises(InputError, match="no file or folder"):
        open_images(tmp_path / "missing", (16, 16), 1)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("text")
    for read in (lambda i: list(i.batches(2)), lambda i: i.load()):
        images = open_images(tmp_path, (16, 16), 1)
        with pytest.warns(SkippedInput), pytest.raises(InputError, match=r"none of the 2.*a\.png"):
            read(images)
        with pytest.raises(InputError, match=r"none of the 2.*a\.png"):
            read(images)
    with pytest.raises(InputError, match=r"^\S*a\.png is not"):  # a single file is never left out
        list(open_images(tmp_path / "a.png", (16, 16), 1).batches(2))
    with pytest.raises(InputError, match="1 .*3 .*not 5"):
        open_images(tmp_path, (16, 16), 5)
    with pytest.raises(InputError, match="batch_size is 0"):
        next(open_images(tmp_path, (16, 16), 1).batches(0))


def test_pillow_is_left_as_it_was(tmp_path):
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    truncated(tmp_path / "a.jpg")
    with pytest.raises(InputError):
        read_image(str(tmp_path / "a.jpg"), (8, 8), 1)
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before


# --- arrays


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "float16", "float32", "float64", ">u2", ">f4"]
)
@pytest.mark.parametrize("size", [(12, 10), (6, 6)])
def test_array_dtypes(dtype, size):
    array = pixels(1, (3, 2, 12, 10), np.float32 if np.dtype(dtype).kind == "f" else dtype)
    array = array.astype(dtype)
    scale = 1.0 if array.dtype.kind == "f" else np.iinfo(dtype).max
    expected = torch.from_numpy((array / scale).astype(np.float32))
    if size != (12, 10):
        expected = F.interpolate(expected, size, mode="bilinear", antialias=True)
    found, _ = everything(open_images(array, size, 2))
    assert (found - expected).abs().max() <= (2 / 255 if dtype == "uint8" else 2e-5)
    assert found.min() >= 0 and found.max() <= 1


def test_bfloat16_tensor_and_rounding():
    tensor = torch.rand(2, 1, 8, 8).to(torch.bfloat16)
    assert torch.equal(everything(open_images(tensor, (8, 8), 1))[0], tensor.float())
    tensor = torch.rand(2, 1, 8, 8, requires_grad=True)
    assert torch.equal(everything(open_images(tensor, (8, 8), 1))[0], tensor.detach())
    array = pixels(0, (1, 8, 8), np.float32)
    array[0, 0, :2] = -1e-7, 1 + 1e-6
    found, _ = everything(open_images(array, (8, 8), 1))
    assert found.min() == 0 and found.max() == 1 and array.max() > 1


def test_a_list_of_files_holds_nothing_else():
    with pytest.raises(InputError, match="the list of files holds a int at 1: 3"):
        open_images(["a.png", 3], (8, 8), 1)


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.zeros((2, 1, 8, 8), np.int64), "int64"),
        (np.zeros((2, 1, 8, 8), bool), "bool"),
        (np.zeros((2, 1, 8, 8), np.complex64), "complex64"),
        (np.zeros((2, 1, 8, 8), object), "object"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int32), "int32"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((2, 1, 1, 8, 8), np.uint8), r"\(2, 1, 1, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), "3 channels instead of 1"),
        (np.zeros((2, 8, 9, 1), np.uint8), "transpose"),
        (np.zeros((0, 1, 8, 8), np.uint8), "empty"),
        (np.zeros((2, 1, 0, 8), np.uint8), "empty"),
        (np.zeros((2, 1, 8, 3), np.uint8), "3x8 pixels and .* at least 4x4"),
    ],
)
def test_arrays_that_are_no_images(array, reason):
    with pytest.raises(InputError, match=reason):
        open_images(array, (8, 8), 1, smallest=(4, 4))


@pytest.mark.parametrize(
    "value, reason",
    [
        (np.nan, "image 1 of the array has NaN"),
        (np.inf, "image 1 of the array has NaN or infinite"),
        (-0.5, r"image 1 of the array has values from -0\.5 .*\[0, 1\]"),
        (255.0, r"image 1 of the array has values from .* to 255: .*\[0, 1\]"),
    ],
)
def test_array_values(value, reason):
    array = pixels(0, (3, 1, 8, 8), np.float32)
    array[1, 0, 3, 3] = value
    for read in (lambda i: list(i.batches(2)), lambda i: i.load()):
        with pytest.raises(InputError, match=reason):
            read(open_images(array, (8, 8), 1))


def test_constant_image_of_an_array():
    array = pixels(0, (3, 2, 8, 8))
    array[2] = np.array([4, 200])[:, None, None]
    with pytest.raises(InputError, match="image 2 of the array is constant"):
        open_images(array, (8, 8), 2).load()


# --- the MVTec AD layout


def mvtec(tmp_path: Path) -> Path:
    for name in ("train/good/0.png", "test/good/0.png", "test/hole/0.png", "test/hole/1.jpg"):
        save(tmp_path / name, pixels())
    mask = np.zeros((40, 24), np.uint8)
    mask[3:6, 2:9] = 1
    save(tmp_path / "ground_truth/hole/0_mask.png", mask)
    save(tmp_path / "ground_truth/hole/1.bmp", mask)
    return tmp_path


def test_mvtec_layout(tmp_path):
    root = mvtec(tmp_path)
    assert mvtec_train(root) == str(root / "train/good")
    assert mvtec_train(root / "train/good") == str(root / "train/good")
    found = mvtec_test(root)
    assert [(Path(t.path).name, t.defect) for t in found] == [
        ("0.png", "good"), ("0.png", "hole"), ("1.jpg", "hole")
    ]  # fmt: skip
    truth = root / "ground_truth" / "hole"
    masks = [None, str(truth / "0_mask.png"), str(truth / "1.bmp")]
    assert [t.mask_path for t in found] == masks
    assert not read_mask(found[0].mask_path, found[0].path).any()
    for test in found[1:]:
        mask = read_mask(test.mask_path, test.path)
        assert mask.dtype == bool and mask.shape == (40, 24) and mask.sum() == 21


@pytest.mark.parametrize("folder", ["test", "ground_truth", "a/b/test", "train/ground_truth"])
def test_a_test_set_is_not_trained_on(tmp_path, folder):
    for name in ("0.png", "train/bad/1.png", ".cache/test/2.png", "tests/3.png"):
        save(tmp_path / name, pixels())
    assert mvtec_train(tmp_path) == mvtec_train(os.fsencode(tmp_path)) == str(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"^{tmp_path / folder} lies in {tmp_path}, and.*normal"):
        mvtec_train(tmp_path)
    (tmp_path / "train/good").mkdir(parents=True, exist_ok=True)
    assert mvtec_train(tmp_path) == str(tmp_path / "train/good")


def test_fit_takes_what_is_normal_of_a_folder(tmp_path, monkeypatch):
    for i in range(12):
        save(tmp_path / f"train/good/{i}.png", pixels(i))
    save(tmp_path / "test/hole/0.png", pixels())
    detector = daf.Detector(
        "image", 32, denoiser="unet-tiny", train_steps=1, batch_size=4, reverse_steps=1
    )
    opened = []
    open_ = daf.detector.open_source
    monkeypatch.setattr(daf.detector, "open_source", lambda *a: (opened.append(a[0]), open_(*a))[1])
    detector.fit(tmp_path)
    assert opened[0] == str(tmp_path / "train/good")
    before = detector.conformal.scores
    detector.calibrate(tmp_path, ["one_step"])
    assert np.array_equal(detector.conformal.scores, before)
    assert len(detector.open(tmp_path)) == 13  # what is scored is searched through
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(InputError, match="test lies in .*: give the folder of normal images"):
        detector.fit(str(tmp_path))


def test_mvtec_without_masks_or_anomalies(tmp_path):
    save(tmp_path / "test/good/0.png", pixels())
    assert [t.defect for t in mvtec_test(tmp_path)] == ["good"]
    save(tmp_path / "test/hole/0.png", pixels())
    assert [t.mask_path for t in mvtec_test(tmp_path)] == [None, None]


def test_mvtec_errors(tmp_path):
    with pytest.raises(InputError, match="no folder test"):
        mvtec_test(tmp_path)
    (tmp_path / "test" / "good").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        mvtec_test(tmp_path)
    root = mvtec(tmp_path)
    (root / "ground_truth/hole/1.bmp").unlink()
    with pytest.raises(InputError, match=r"1\.jpg has no mask: .*1_mask\.png"):
        mvtec_test(root)


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a.png").write_bytes(b"")
    found = files_below(str(tmp_path), lambda name: name.endswith(".png"))
    assert [os.path.basename(path) for path in found] == ["a.png", "lost.png"]


def test_links_to_folders_are_followed_and_each_folder_is_seen_once(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "own" / "deep", data / ".hidden", elsewhere / "good"):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(b"")
    (data / "a link").symlink_to(data / "own" / "deep")  # the folder's own name stays
    (data / "more").symlink_to(elsewhere)
    (data / "again").symlink_to(elsewhere / "good")
    (data / "own" / "up").symlink_to(data)
    (data / ".hidden too").symlink_to(elsewhere)
    found = files_below(str(data), lambda name: name.endswith(".png"))
    assert [os.path.relpath(path, data) for path in found] == ["again/a.png", "own/deep/a.png"]


@pytest.mark.parametrize(
    "name, target",
    [
        ("b", "more/test"),
        ("b", "../elsewhere/test"),
        ("b", "../elsewhere/test/scratch"),
        ("b", "../other/part"),
        ("test", "more/good"),
        ("train/good/up", "."),
    ],
)
def test_a_link_hides_no_test(tmp_path, name, target):
    """Nor does a root in a folder of that name, or a link to what is no test."""
    data = tmp_path / "test" / "data"
    for folder in ("data/more/good", "data/train/good", "elsewhere/test/scratch", "other"):
        (tmp_path / "test" / folder).mkdir(parents=True)
    (data / "fine").symlink_to(data / ".." / "other")
    (data / "itself").symlink_to(data)
    (data / "lost").symlink_to(data / "nowhere")
    check_no_test(str(data), "images")
    assert mvtec_train(data) == str(data / "train" / "good")
    if target == "more/test":
        (data / target).mkdir()
    if target == "../other/part":
        (data / target).symlink_to(data / "../elsewhere/test/scratch")
    if name.startswith("train"):
        (data / "test").mkdir()
    (data / name).symlink_to(data / target)
    with pytest.raises(InputError, match="lies in .* a detector is not trained"):
        check_no_test(str(data), "images")
    if name.startswith("train"):
        with pytest.raises(InputError, match="train/good/up/test lies in"):
            mvtec_train(data)


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
