"""Removes images from an index, but not their files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loopitr.reading import user_path

from .contents import Contents
from .manifest import read_manifest, read_skipped, write_skipped, writing
from .sources import shown
from .stores import open_images


def remove_images(
    index: str | Path, paths: Sequence[str | Path] = (), *, where: str | None = None, missing: bool = False
) -> int:
    """Remove images from an index; returns their number.

    Of several criteria, images must meet all.

    Args:
        paths: paths of images, or of folders, for all images in them.
        where: an SQL condition on the columns.
        missing: remove images whose files no longer exist.

    Raises:
        FileNotFoundError: there is no such index.
        ValueError: no criterion is given, a path is empty, or the index has no image at one of the paths; then none is
            removed.
    """
    if not paths and where is None and not missing:
        raise ValueError("nothing is named to remove: give paths, a condition (where), or missing")
    if any(not str(path).strip() for path in paths):  # It would be taken for the current folder.
        raise ValueError("a path to remove is empty")
    manifest = read_manifest(index)
    folder = user_path(index)
    with writing(folder):
        images = open_images(folder, manifest)
        chosen = images.listed(where)
        if paths:
            files = [os.fsencode(os.path.abspath(user_path(path))) for path in paths]
            names = [str(path) for path in paths]
            ids_of_paths = {
                path: {image.id for image in chosen if _under(image.file, image.path, path, name)}
                for path, name in zip(files, names)
            }
            for file, ids in ids_of_paths.items():
                if not ids:
                    raise ValueError(f"{index} holds no image {shown(os.fsdecode(file))}")
            ids_of_any = set().union(*ids_of_paths.values())
            chosen = [image for image in chosen if image.id in ids_of_any]
        if missing:
            chosen = [image for image in chosen if image.file and not os.path.exists(image.file)]
        removed = [image.id for image in chosen]
        # Images go first: if this is interrupted, contents without an image are harmless.
        images.delete(removed)
        Contents.open(folder, manifest).delete(removed)
        if removed:
            images.finish()  # A vector index would keep partitions for all images, and searches read as few as for now.
        skipped = read_skipped(folder)
        roots = [shown(os.path.abspath(user_path(path))) for path in paths]
        write_skipped(folder, {p: why for p, why in skipped.items() if not any(_inside(p, root) for root in roots)})
    return len(removed)


def _under(file: bytes, name: str, path: bytes, given: str) -> bool:
    """Whether an image is at `path` or in that folder; an image that is not a file is identified by its name."""
    if not file:
        return name == given
    return file == path or file.startswith(path.rstrip(b"/") + b"/")


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
