"""Folders of small photos, good and bad, and an index of them by a tiny model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from helpers.support import tiny_model
from helpers.tiny_gallery import jpeg, picture, tiny_processor

from loopitr import Retriever, build_index
from loopitr.search.contents import Contents
from loopitr.search.lance import LanceImages, Row
from loopitr.search.manifest import read_manifest
from loopitr.search.writer import IndexReport


def tiny_retriever(**changes: Any) -> Retriever:
    return Retriever(tiny_model(**changes), tiny_processor())


def write_photos(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number:03}.jpg").write_bytes(jpeg(number))
    return folder


def write_bad_photos(folder: Path) -> dict[str, str]:
    """Files and other things that are no images; name -> the reason why they are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.jpg").write_bytes(jpeg(1)[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    picture(0, (200, 20_000)).save(folder / "long.png")
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.jpg").write_bytes(jpeg(1))
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    return {
        "broken.jpg": "truncated",
        "empty.png": "empty file",
        "text.jpg": "not a known image format",
        "pipe.jpg": "not a file but a FIFO",
        "device.jpg": "not a file but a device",
        "gone.jpg": "no such file",
        "itself.jpg": "Too many levels of symbolic links",
        "long.png": "too many pixels",
    }


def index(source: Any, model: Any, output: Path, **options: Any) -> IndexReport:
    """`build_index` in this process, in small batches, without a bar."""
    return build_index(source, model, output, **{"batch_size": 4, "num_workers": 0, "show_progress": False, **options})


def listed(folder: Path) -> dict[str, Row]:
    """Rows of an index by the names of their files; each is there once, and has its tokens."""
    manifest = read_manifest(folder)
    rows = LanceImages.open(folder, manifest.embed_dim).listed()
    kept = Contents.open(folder, manifest).ids()
    assert len({row.path for row in rows}) == len({row.id for row in rows}) == len(rows)
    assert sorted(kept) == sorted(row.id for row in rows) or manifest.tokens is None
    return {os.path.basename(row.path): row for row in rows}
