import os

import pytest
import torch
from safetensors import safe_open

from diffad_fast.errors import CheckpointError, InputError
from diffad_fast.files import remove_leftovers
from diffad_fast.training import checkpoint

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.randn(4, 4).bfloat16().T,
    "empty": torch.empty(0, 3),
}


def write(path):
    checkpoint.save(path, "diffad", TENSORS, {"config": "{}"})
    return path


def test_round_trip_and_plain_safetensors(tmp_path):
    path = write(tmp_path / "m.diffad")
    tensors, texts = checkpoint.load(path, "diffad")
    assert texts["config"] == "{}"
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)
    assert os.listdir(tmp_path) == ["m.diffad"]


def test_tensors_of_one_memory(tmp_path):
    """As a layer has that stands in a network twice."""
    path, whole = tmp_path / "m.diffad", torch.arange(6.0)
    given = {"a": whole, "again": whole, "part": whole[2:], "other": torch.zeros(3)}
    checkpoint.save(path, "diffad", given, {})
    tensors, _ = checkpoint.load(path, "diffad")
    assert all(torch.equal(tensors[name], given[name]) for name in given)


def test_every_flipped_byte_is_noticed(tmp_path):
    path = write(tmp_path / "m.diffad")
    content = path.read_bytes()
    for position in range(len(content)):
        broken = bytearray(content)
        broken[position] ^= 0x11
        path.write_bytes(broken)
        try:
            tensors, texts = checkpoint.load(path, "diffad")
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            # Padding of the header between JSON and data carries nothing.
            assert content[position : position + 1].isspace()
            assert texts["config"] == "{}" and torch.equal(tensors["a"], TENSORS["a"])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, share):
    path = write(tmp_path / "m.diffad")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="m.diffad"):
        checkpoint.load(path, "diffad")


def test_newer_version(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 7)
    path = write(tmp_path / "m.diffad")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 7.*upgrade"):
        checkpoint.load(path, "diffad")


def test_a_version_that_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", "²")
    path = write(tmp_path / "m.diffad")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="damaged: its format version is '²'"):
        checkpoint.load(path, "diffad")


def test_other_files(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(CheckpointError, match="there is no file"):
        checkpoint.load(path, "diffad")
    path.write_text("hello, I am a text file, not a model")
    with pytest.raises(CheckpointError, match="not a diffad_fast file"):
        checkpoint.load(path, "diffad")
    checkpoint.save(path, "diffad-training", TENSORS, {})
    with pytest.raises(CheckpointError, match="it is a diffad-training file"):
        checkpoint.load(path, "diffad")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path, "diffad")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "m.diffad")
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        checkpoint.save(path, "diffad", {"a": torch.ones(3)}, {})
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["m.diffad"]


def test_a_temporary_file_that_another_process_removes(tmp_path, monkeypatch):
    path = write(tmp_path / "m.diffad")
    old, chmod = path.read_bytes(), os.chmod

    def removed(*arguments):
        chmod(*arguments)
        remove_leftovers(path)

    monkeypatch.setattr(os, "chmod", removed)
    with pytest.raises(InputError, match="cannot write .*m.diffad: No such file"):
        checkpoint.save(path, "diffad", {"a": torch.ones(3)}, {})
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["m.diffad"]
