"""Atomic writing of files."""

import errno
import os
from pathlib import Path

import pytest

from loopitr import durable
from loopitr.durable import write_file, write_files


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_is_written_as_it_is(tmp_path):
    write_file(tmp_path / "a", "one\r\ntwo\n")
    assert (tmp_path / "a").read_bytes() == b"one\r\ntwo\n"


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path, monkeypatch):
    write_file(tmp_path / "a", "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(durable.os, "fsync", full)
        write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_device_is_not_replaced():
    """`--output /dev/null` of an administrator would take it from the whole machine."""
    with pytest.raises(OSError, match="/dev/null is a device"):
        write_file(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device() and not Path("/dev/null.partial").exists()


def test_files_written_together_replace_those_of_their_names_alone(tmp_path):
    for name in ("a", "README.md", "mine"):
        (tmp_path / name).write_text("old")

    def write(folder):
        assert [path.name for path in folder.iterdir()] == ["README.md"]  # which it may leave as it is
        (folder / "a").write_text("new")

    write_files(tmp_path, write, seen=("README.md", "absent"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": "new",
        "README.md": "old",
        "mine": "old",
    }


def test_a_file_is_not_written_through_a_link(tmp_path):
    other, path = tmp_path / "file", tmp_path / "new.json"
    other.write_text("mine")
    (tmp_path / "new.json.partial").symlink_to(other)
    write_file(path, "\r\n{}")
    assert path.read_bytes() == b"\r\n{}" and not path.is_symlink() and other.read_text() == "mine"
    write_file(path, "again")
    assert path.read_text() == "again" and sorted(tmp_path.iterdir()) == [other, path]
