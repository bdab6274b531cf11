"""Which images of one set of records are also in another, by the content of their files.

A size costs far less to learn than a hash, so that only files of equal size are read. An image that was encoded anew
has other bytes and is not recognised.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .records import Record
from .scenes import SceneRecords

SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SharedImage:
    """The name of an image in the first set of records, and the name that the same image has in the second."""

    name: str
    other: str


def shared_images(records: Sequence[Record], others: Sequence[Record]) -> list[SharedImage]:
    """The images of `records` whose content one of `others` has too, in their order.

    Files that are missing or unreadable are in neither. Splits of the built-in scenes have no scene in common, and
    are not rendered to see that.

    Example:
        >>> from loopitr.data import Record, shared_images
        >>> held_out = [Record(image=b"x", captions=("x",), name="x.jpg"), Record(image=b"y", captions=("y",))]
        >>> shared_images(held_out, [Record(image=b"x", captions=("an x",), name="copy of x.jpg")])
        [SharedImage(name='x.jpg', other='copy of x.jpg')]
    """
    if isinstance(records, SceneRecords) and isinstance(others, SceneRecords) and records.split != others.split:
        return []
    wanted: dict[Hashable, list[int]] = {}
    for index in range(len(records)):
        size = _size(records[index].image)
        if size is not None:
            wanted.setdefault(size, []).append(index)
    digests: dict[Hashable, dict[bytes, list[int]]] = {}  # of the records of one size, hashed when they are needed
    names: dict[int, str] = {}
    for number in range(len(others)):
        other = others[number]
        size = _size(other.image)
        if size not in wanted:
            continue
        if size not in digests:
            digests[size] = _by_digest(records, wanted[size])
        for index in digests[size].get(_digest(other.image) or b"", ()):
            names.setdefault(index, other.name)
    return [SharedImage(name=records[index].name, other=names[index]) for index in sorted(names)]


def listed(names: Iterable[str]) -> str:
    """The first few of some names, for one line of a log."""
    all_names = list(names)
    return ", ".join(all_names[:SHOWN]) + (", ..." if len(all_names) > SHOWN else "")


def _by_digest(records: Sequence[Record], positions: Sequence[int]) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for index in positions:
        digest = _digest(records[index].image)
        if digest is not None:
            found.setdefault(digest, []).append(index)
    return found


def _size(image: str | Path | bytes | Image.Image) -> Hashable:
    """What equal images have in common without a look at their content; None for a file that cannot be read."""
    if isinstance(image, bytes):
        return len(image) or None
    if isinstance(image, Image.Image):
        return (image.mode, *image.size)
    try:
        status = os.stat(image)
    except (OSError, ValueError):
        return None
    # A pipe or a device is not read: it may never end.
    return status.st_size or None if stat.S_ISREG(status.st_mode) else None


def _digest(image: str | Path | bytes | Image.Image) -> bytes | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        if isinstance(image, bytes):
            digest.update(image)
        elif isinstance(image, Image.Image):
            digest.update(image.tobytes())
        else:
            with open(image, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    except Exception:  # A PIL image may be a file that is decoded only now, and any decoder's error can come.
        return None
    return digest.digest()
