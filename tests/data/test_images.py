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
from pictures import mvtec, pixels, png_chunk, save, truncated
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import diffad_fast as daf
from diffad_fast.data import samples
from diffad_fast.data.image_files import read_image
from diffad_fast.data.images import open_images
from diffad_fast.data.mvtec import mvtec_test
from diffad_fast.errors import InputError, SkippedInput


def folder_of(tmp_path: Path, number: int) -> Path:
    for i in range(number):
        save(tmp_path / "good" / f"{i:03d}.png", pixels(i))
    return tmp_path / "good"


def everything(images, batch_size=4, indices=None):
    batches = list(images.batches(batch_size, indices))
    return torch.cat([b.x for b in batches]), torch.cat([b.index for b in batches]).tolist()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than its few bytes hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


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


def test_pictures_in_memory_are_what_their_files_are(tmp_path):
    """As a service has them: open files, images of Pillow's; also beside paths."""
    paths = [save(tmp_path / f"{i}.png", pixels(i)) for i in range(4)]
    expected = everything(open_images(paths, (16, 16), 1))[0]
    data = [Path(path).read_bytes() for path in paths]
    with Image.open(paths[2]) as opened:
        sources = [io.BytesIO(data[0]), io.BytesIO(data[1]), opened, paths[3]]
        sources[1].read()
        found = open_images(sources, (16, 16), 1)
        for _ in range(2):
            assert torch.equal(everything(found)[0], expected)
    assert found.paths is None and len(found) == 4
    with open(paths[0], "rb") as file:
        for one in (file, io.BytesIO(data[0]), Image.fromarray(pixels(0))):
            assert torch.equal(everything(open_images(one, (16, 16), 1))[0], expected[:1])
    colour = Image.fromarray(pixels(0)).convert("RGB")
    found = everything(open_images(colour, (16, 16), 3))[0]
    assert torch.equal(found, expected[:1].expand(-1, 3, -1, -1))
    turned = Image.fromarray(pixels(0))
    turned.getexif()[0x0112] = 3  # by half a turn
    found, upright = (everything(open_images(x, None, 1))[0] for x in (turned, pixels(0)[None]))
    assert torch.equal(found, upright.flip(2, 3))
    assert turned.tobytes() == pixels(0).tobytes()


def test_one_picture_several_times_in_a_list():
    """Threads read it one after the other: it has one place in its file."""
    rng = np.random.default_rng(0)
    large = Image.fromarray(rng.integers(0, 256, (600, 600), dtype=np.uint8))
    file = io.BytesIO()
    large.save(file, "png")
    expected = torch.from_numpy(np.array(large) / np.float32(255))
    for one in (file, Image.open(file)):
        found, _ = everything(open_images([one] * 8, (600, 600), 1))
        assert torch.equal(found, expected.expand(8, 1, -1, -1))


def test_unusable_pictures_in_memory_are_told_by_their_place(tmp_path):
    good = Path(save(tmp_path / "a.png", pixels())).read_bytes()
    pipe, end = os.pipe()
    os.close(end)
    with os.fdopen(pipe, "rb") as once:
        for bad, message in (
            (io.BytesIO(b"no image"), "is not an image"), (io.BytesIO(good[:200]), ".*damaged"),
            (io.BytesIO(), "is not an image"), (Image.new("L", (20, 20)), "is constant"),
            (once, "is a file that cannot be read again"),
        ):  # fmt: skip
            both = [io.BytesIO(good), bad]
            for source, name in ((both, "image 1 of the list"), (bad, "the image")):
                with pytest.raises(InputError, match=f"{name} {message}"):
                    everything(open_images(source, (16, 16), 1))
    with pytest.raises(InputError, match="holds a int at 1"):
        open_images([io.BytesIO(good), 3], (16, 16), 1)
    for content in (good, bytearray(good), [good], [str(tmp_path), good]):
        with pytest.raises(InputError, match="bytes are no path.*io.BytesIO"):
            open_images(content, (16, 16), 1)
    assert open_images(os.fsencode(tmp_path), (16, 16), 1).paths == [str(tmp_path / "a.png")]
    with pytest.raises(InputError, match=r"one image is to have the shape \(1, C, H, W\)"):
        open_images(np.zeros((20, 24, 3), np.uint8), (16, 16), 3)
    with pytest.raises(InputError, match=r"\(20, 24, 3\) seems to be one image in colour"):
        open_images(np.zeros((20, 24, 3), np.uint8), (16, 16), 1)


def test_masks_in_a_data_set_are_no_images(tmp_path):
    root = mvtec(tmp_path)
    paths = open_images(root, (16, 16), 1).paths
    assert [Path(path).relative_to(root).parts[0] for path in paths] == ["test"] * 3 + ["train"] * (
        len(paths) - 3
    )
    masks = open_images(root / "ground_truth", (16, 16), 1).paths  # asked for by name
    assert len(masks) == 2


def test_colours_that_become_grey_are_told(tmp_path, recwarn):
    grey = np.repeat(pixels()[..., None], 3, axis=2)
    path = save(tmp_path / "grey.png", grey)
    read_image(path, None, 1)
    colour = grey.copy()
    colour[:20, :, 2] = 255 - colour[:20, :, 2] // 4
    path = save(tmp_path / "colour.png", colour)
    read_image(path, None, 3)
    assert not recwarn
    with pytest.warns(UserWarning, match="colour images are read in grey.*channels=3"):
        read_image(path, None, 1)


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


@pytest.mark.parametrize(("shape", "batch_size"), [((8, 8), 4), ((8, 8), None), ((1, 8, 8), None)])
def test_a_loader_of_images_and_masks(shape, batch_size):
    """PyTorch makes lists of its tuples; the last batch has one image."""
    images = torch.rand(5, *shape)
    loader = DataLoader(TensorDataset(images, torch.zeros(5, *shape)), batch_size=batch_size)
    found, index = everything(open_images(loader, (8, 8), 1))
    assert torch.equal(found, images.view(5, 1, 8, 8)) and index == list(range(5))


def test_a_loader_may_fill_its_batch_anew():
    array = np.random.default_rng(0).random((8, 1, 6, 6), dtype=np.float32)

    class Refilling:
        def __iter__(self):
            batch = np.empty_like(array[:2])
            for i in range(0, len(array), 2):
                batch[:] = array[i : i + 2]
                yield batch

    images = open_images(Refilling(), (6, 6), 1)
    np.testing.assert_array_equal(everything(images)[0], array)
    images.load()
    np.testing.assert_array_equal(everything(images)[0], array)


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
    one = np.random.default_rng(0).random((1, 8, 8), dtype=np.float32)
    for images, channels in (
        ([one, one], 1), (list(torch.rand(4, 8, 8)), 1), ([one[0], one[0, 2:]], 1),
        (list(np.repeat(one[None], 3, axis=1).repeat(3, axis=0)), 3),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"gave a list of {len(images)} images: stack"):
            list(open_images([images], (8, 8), channels).batches(2))
    for batch in ([one, 1], [one, one > 0], (one, one), [one], [one, torch.tensor([1])]):
        np.testing.assert_array_equal(everything(open_images([batch], (8, 8), 1))[0], one[None])
    with pytest.raises(InputError, match="the loader has masked values"):
        list(open_images([np.ma.masked_less(one, 0.5)], (8, 8), 1).batches(2))
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
        (np.ma.masked_less(np.eye(8)[None], 1), "the array has masked values: fill them"),
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
