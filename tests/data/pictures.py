"""Pictures, and files of them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


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


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def truncated(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(0, (200, 200))).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[:2000])


def mvtec(tmp_path: Path) -> Path:
    for name in ("train/good/0.png", "test/good/0.png", "test/hole/0.png", "test/hole/1.jpg"):
        save(tmp_path / name, pixels())
    mask = np.zeros((40, 24), np.uint8)
    mask[3:6, 2:9] = 1
    save(tmp_path / "ground_truth/hole/0_mask.png", mask)
    save(tmp_path / "ground_truth/hole/1.bmp", mask)
    return tmp_path
