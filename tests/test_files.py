import errno
import os
import re
from pathlib import Path

import pytest

from diffad_fast.errors import InputError
from diffad_fast.files import (
    check_result_folder,
    check_writable,
    remove_leftovers,
    result_folder,
    with_end,
    write_atomically,
)


def test_unwritable_places(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / "no" / "such" / "m.diffad")
    with pytest.raises(InputError, match="folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "m.diffad")
    assert not os.listdir(tmp_path)


def test_names_fit_into_a_folder(tmp_path):
    assert with_end(251 * "a", ".png") == 251 * "a" + ".png"
    names = [250 * "a" + last for last in ("bc", "bd", "bcde")]
    names += [126 * "ä" + "b", 250 * "b" + "\udcff\udcfe"]  # bytes that are no text
    found = [with_end(name, ".png") for name in names]
    assert len(set(found)) == len(names)
    for made, name in zip(found, names, strict=True):
        (tmp_path / made).touch()
        assert made.endswith(".png") and made[:100] == name[:100]
        assert made == with_end(name, ".png")


def test_the_file_behind_a_link_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "link", tmp_path / "real" / "m.diffad"
    link.symlink_to(target)
    for content in (b"one", b"two"):  # where there is none yet, and over one
        check_writable(link)
        write_atomically(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    leftover = target.with_name(".m.diffad.abcdefgh")  # of a process that was killed
    leftover.touch()
    remove_leftovers(link)
    assert not leftover.exists()


def test_folders_that_cannot_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    for path in (file, file / "below", tmp_path / "dangling" / "below"):
        with pytest.raises(InputError, match=re.escape(str(path))):
            check_result_folder(path)
        with pytest.raises(InputError, match=re.escape(str(path))), result_folder(path):
            pass
    check_result_folder(tmp_path / "a" / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot write to .*out: No space left on device"):
        with result_folder(tmp_path / "out") as staged, open(staged / "scores.csv", "w"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not os.listdir(tmp_path)


def test_result_folder_replaces_its_own_entries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("one", "two"):
        with result_folder(Path("a/b")) as staged:
            (staged / "maps").mkdir()
            (staged / "maps" / text).write_text(text)
            (staged / "list").write_text(text)
    left = sorted(str(p) for p in Path("a").rglob("*"))
    assert left == ["a/b", "a/b/list", "a/b/maps", "a/b/maps/two"]
    assert Path("a/b/list").read_text() == "two"
