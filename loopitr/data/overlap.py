"""Finds the images that two sets of records have in common, by the content of their files.

Only files of equal size are read. A copy that was encoded again has other bytes and is not recognised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .image_sizes import file_size
from .records import Record
from .scenes import SceneRecords

SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SharedImage:
    """The name of an image in the first set of records, and the name that the same image has in the second.

    `index` is the position in the first set, where several images may have one name.
    """

    name: str
    other: str
    index: int = 0


def shared_images(records: Sequence[Record], others: Sequence[Record]) -> list[SharedImage]:
    """The images of `records` whose content is also in `others`, in the order of `records`.

    Files that are missing or unreadable are ignored. Different splits of the built-in scenes have no scene in common,
    so they are not rendered.

    Example:
        >>> from loopitr.data import Record, shared_images
        >>> held_out = [Record(image=b"x", captions=("x",), name="x.jpg"), Record(image=b"y", captions=("y",))]
        >>> shared_images(held_out, [Record(image=b"x", captions=("an x",), name="copy of x.jpg")])
        [SharedImage(name='x.jpg', other='copy of x.jpg')]
    """
    if isinstance(records, SceneRecords) and isinstance(others, SceneRecords) and records.split != others.split:
        return []
    by_size: dict[Hashable, list[int]] = {}
    for index in range(len(records)):
        size = _size(records[index].image)
        if size is not None:
            by_size.setdefault(size, []).append(index)
    digests: dict[Hashable, dict[bytes, list[int]]] = {}  # The records of one size are hashed when they are needed.
    names: dict[int, str] = {}
    for number in range(len(others)):
        other = others[number]
        size = _size(other.image)
        if size not in by_size:
            continue
        if size not in digests:
            digests[size] = _by_digest(records, by_size[size])
        for index in digests[size].get(_digest(other.image) or b"", ()):
            names.setdefault(index, other.name)
    return [SharedImage(name=records[index].name, other=names[index], index=index) for index in sorted(names)]


def listed(names: Iterable[str]) -> str:
    """The first few of `names` in one line, for a log."""
    all_names = list(names)
    return ", ".join(all_names[:SHOWN]) + (", ..." if len(all_names) > SHOWN else "")


def _by_digest(records: Sequence[Record], positions: Sequence[int]) -> dict[bytes, list[int]]:
    by_digest: dict[bytes, list[int]] = {}
    for index in positions:
        digest = _digest(records[index].image)
        if digest is not None:
            by_digest.setdefault(digest, []).append(index)
    return by_digest


def _size(image: str | Path | bytes | Image.Image) -> Hashable:
    """A value that equal images share and that is cheap to get; None for a file that cannot be read."""
    if isinstance(image, bytes):
        return len(image) or None
    if isinstance(image, Image.Image):
        return (image.mode, *image.size)
    size = file_size(image)
    return size if size > 0 else None


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
    except Exception:  # A PIL image may be decoded only now, and decoders raise errors of many kinds.
        return None
    return digest.digest()
