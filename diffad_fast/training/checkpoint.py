"""Checkpoints: one safetensors file with a checksum, written whole or not at all.

The header's metadata holds ``format`` (what kind of file this is), ``format_version``, ``version``
(of the library), ``sha256`` and the caller's own JSON texts. The checksum covers all of these and
every tensor's name, type, shape and bytes. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..config import DetectorConfig
from ..errors import CheckpointError, InputError
from ..files import write_atomically
from ..version import __version__

FORMAT_VERSION = 4


def save(
    path: str | os.PathLike,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
) -> None:
    """Write ``tensors`` and ``texts`` to ``path`` as a file of that ``kind``, atomically.

    Raises InputError where the folder is missing or cannot be written to; ``path`` then still
    holds what it held before.
    """
    write_atomically(path, to_bytes(kind, tensors, texts))


def to_bytes(kind: str, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> bytes:
    """What :func:`save` writes."""
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # A layer that a network has under two names: safetensors takes no two tensors of one memory.
    owners: dict[int, str] = {}
    for name, t in tensors.items():
        if owners.setdefault(t.untyped_storage().data_ptr(), name) != name:
            tensors[name] = t.clone()
    metadata = {
        **texts,
        "format": kind,
        "format_version": str(FORMAT_VERSION),
        "version": __version__,
    }
    metadata["sha256"] = checksum(tensors, metadata)
    return save(tensors, metadata)


def load(path: str | os.PathLike, kind: str) -> tuple[Content, Content]:
    """Tensors and texts that :func:`save` wrote. Raises CheckpointError in one sentence that names
    the file."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return from_bytes(content, path, kind)


def from_bytes(content: bytes, path: str | os.PathLike, kind: str) -> tuple[Content, Content]:
    """:func:`load` from what :func:`to_bytes` gave; ``path`` is for its messages."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    metadata = _metadata(path, content)
    if metadata.get("format") != kind:
        raise CheckpointError(
            f"{path} is not a {kind} file: "
            + (
                f"it is a {metadata['format']} file"
                if "format" in metadata
                else "no such mark in it"
            )
        )
    found = metadata.get("format_version", "")
    if not found.isdecimal():
        raise CheckpointError(f"{path} is damaged: its format version is {found!r}")
    if int(found) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {found}, written by diffad_fast {metadata.get('version', '?')}; "
            f"diffad_fast {__version__} reads formats up to {FORMAT_VERSION}: upgrade diffad_fast"
        )
    if int(found) < FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {found}, written by diffad_fast {metadata.get('version', '?')}; "
            f"this one reads format {FORMAT_VERSION}: fit again, or use that version"
        )
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from None
    if checksum(tensors, metadata) != metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    return Content(tensors, path), Content(metadata, path)


def _metadata(path: str | os.PathLike, content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of header length, then the JSON header."""
    wrong = CheckpointError(f"{path} is not a diffad_fast file, or it is damaged")
    if len(content) < 8:
        raise wrong
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content) - 8:
        raise wrong
    try:
        header = json.loads(content[8 : 8 + length])
        metadata = header.get("__metadata__", {})
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, RecursionError):
        raise wrong from None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise wrong
    return metadata


def checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU, and of texts."""
    digest = hashlib.sha256()
    texts = {name: text for name, text in metadata.items() if name != "sha256"}
    digest.update(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Content(dict):
    """Tensors or texts of the file at ``path``, which has what is asked for or is none of ours."""

    def __init__(self, content: Mapping, path: str | os.PathLike):
        super().__init__(content)
        self.path = path

    def __missing__(self, name: str):
        raise CheckpointError(
            f"{self.path} is incomplete, {name} is not in it: take it as it was written, or fit "
            "anew"
        )

    def json(self, name: str, fits: Callable[[object], bool]):
        """What stands in a text, which is none of ours unless it ``fits``."""
        try:
            found = json.loads(self[name])
        except (ValueError, RecursionError):
            raise self.damaged(name) from None
        if not fits(found):
            raise self.damaged(name)
        return found

    def config(self) -> DetectorConfig:
        options = self.json("config", lambda found: isinstance(found, dict))
        try:
            return DetectorConfig.stored(options)
        except InputError as error:
            raise CheckpointError(
                f"{self.path} was fitted with options that this version refuses: {error}; fit again"
            ) from None

    def like(self, name: str, other: torch.Tensor) -> torch.Tensor:
        """A tensor, which is none of ours unless it has the type and shape of another one."""
        found = self[name]
        if (found.dtype, found.shape) != (other.dtype, other.shape):
            raise self.damaged(name)
        return found

    def damaged(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged, its {name} cannot be read: take it as it was written, or fit "
            "anew"
        )
