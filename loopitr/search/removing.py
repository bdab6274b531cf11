"""Images taken out of an index; their files stay."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .contents import Contents
from .manifest import read_manifest, read_skipped, write_skipped, writing
from .sources import shown
from .stores import open_images


def remove_images(
    index: str | Path, paths: Sequence[str | Path] = (), *, where: str | None = None, missing: bool = False
) -> int:
    """Remove images from an index; returns how many there were.

    Args:
        paths: of images, or of folders with all that is in them.
        where: an SQL condition on the columns; with `paths`, both must hold.
        missing: those whose files are gone; with the others, all must hold.

    Raises:
        FileNotFoundError: no index there.
        ValueError: neither paths nor a condition; a path that no image of the index has, of which none is removed then.
    """
    if not paths and where is None and not missing:
        raise ValueError("nothing is named that could be removed: give paths, a condition (where), or missing")
    manifest = read_manifest(index)
    folder = Path(index).expanduser()
    with writing(folder):
        images = open_images(folder, manifest)
        found = images.listed(where)
        if paths:
            files = [os.fsencode(os.path.abspath(path)) for path in paths]
            names = [str(path) for path in paths]
            held = {
                path: {image.id for image in found if _under(image.file, image.path, path, name)}
                for path, name in zip(files, names)
            }
            for file, ids in held.items():
                if not ids:
                    raise ValueError(f"{index} holds no image {shown(os.fsdecode(file))}")
            chosen = set().union(*held.values())
            found = [image for image in found if image.id in chosen]
        if missing:
            found = [image for image in found if image.file and not os.path.exists(image.file)]
        gone = [image.id for image in found]
        images.delete(gone)  # An image without contents is found, contents without an image are not.
        Contents.open(folder, manifest).delete(gone)
        skipped = read_skipped(folder)
        roots = [shown(os.path.abspath(path)) for path in paths]
        write_skipped(folder, {p: why for p, why in skipped.items() if not any(_inside(p, root) for root in roots)})
    return len(gone)


def _under(file: bytes, name: str, wanted: bytes, given: str) -> bool:
    if not file:
        return name == given
    return file == wanted or file.startswith(wanted.rstrip(b"/") + b"/")


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
