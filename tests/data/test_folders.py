from __future__ import annotations

import errno
import os

import pytest

from diffad_fast.data.folders import check_no_test, files_below
from diffad_fast.data.image_files import read_image
from diffad_fast.data.mvtec import mvtec_train
from diffad_fast.errors import InputError


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "a.png").write_bytes(b"")
    found = files_below(str(tmp_path), lambda name: name.endswith(".png"))
    assert [os.path.basename(path) for path in found] == ["a.png", "lost.png"]
    for name in ("pipe.png", "link.png"):
        with pytest.raises(InputError, match=f"{name} is a pipe or a device"):
            read_image(str(tmp_path / name), (16, 16), 1)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("locked", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    scan = os.scandir

    def scandir(path):
        if os.path.basename(path) == "locked":  # root could read it, whatever its permissions
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    message = f"^{tmp_path / 'locked'} cannot be read .Permission denied.: check its permissions"
    with pytest.raises(InputError, match=message):
        files_below(str(tmp_path), lambda name: name.endswith(".png"))
    with pytest.raises(InputError, match=message):
        check_no_test(str(tmp_path), "images")


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
