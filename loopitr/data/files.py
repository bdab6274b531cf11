"""Common parts of the sources that are files: reading JSON, finding image folders, grouping rows by image."""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopitr.reading import parse_json

from .records import DataError, Record, printable
from .report import LoadReport, clean_captions

PROBED = 8  # The number of images whose files are looked for at load; other missing files are counted when read.


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of an annotation file: the path of an image as written, its captions, and a key for its identity."""

    image: str
    captions: Any
    identity: Hashable


class Identities:
    """Numbers images, with one number for all that share a key, directly or through an image between them.

    Example:
        >>> from loopitr.data.files import Identities
        >>> identities = Identities()
        >>> for image, key in (("a.jpg", 1), ("b.jpg", 2), ("b.jpg", 1), ("c.jpg", 3)):
        ...     identities.join(image, key)
        >>> [identities.number(image) for image in ("a.jpg", "b.jpg", "c.jpg")]
        [0, 0, 1]
    """

    def __init__(self) -> None:
        self._parents: dict[Hashable, Hashable] = {}
        self._numbers: dict[Hashable, int] = {}

    def join(self, image: Hashable, key: Hashable) -> None:
        """Let `image` have the number of all images with this `key`."""
        self._parents[self._root(("key", key))] = self._root(("image", image))

    def number(self, image: Hashable) -> int:
        """The number of an image, in the order of these calls, after the last call of `join`."""
        return self._numbers.setdefault(self._root(("image", image)), len(self._numbers))

    def _root(self, node: Hashable) -> Hashable:
        parents = self._parents
        while (parent := parents.setdefault(node, node)) != node:
            parents[node] = node = parents[parent]  # This halves the way for the next call.
        return node


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 file, with or without a byte order mark.

    Raises:
        DataError: the file cannot be read, is not a regular file (reading a pipe or a device may never end), or has
            another encoding.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise DataError(f"{path}: not a file")
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # for a path with a zero byte
        raise DataError(f"{printable(str(path))}: {error}") from error
    if "\0" in text:  # ASCII letters in UTF-16 are valid UTF-8, with a zero byte after each.
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}: not UTF-8 text (a zero byte in line {line})")
    return text


def read_json(path: str | Path) -> Any:
    """The parsed content of a JSON file.

    Raises:
        DataError: the file cannot be read or is not valid JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def image_folder(images: str | Path) -> Path:
    """The folder as a `Path`.

    Raises:
        DataError: there is no such folder.
    """
    folder = Path(images)
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is not a folder' if folder.exists() else 'no such image folder'}")
    return folder


def check_images_exist(paths: Sequence[Path], source: str | Path) -> None:
    """Check that the image folder is right: that one of the first few images exists.

    Raises:
        DataError: none of them exists.
    """
    probe = paths[:PROBED]
    if probe and not any(os.path.isfile(path) for path in probe):
        raise DataError(f"{source}: none of its first {len(probe)} images exists; tried {printable(str(probe[0]))}")


def group_rows(
    rows: Iterable[Row], *, source: str | Path, images: str | Path | None, split: str | None, report: LoadReport
) -> list[Record]:
    """One record per image file, with the captions of all its rows; equal `identity` keys get equal integers.

    Relative image paths start at `images`, or at the folder of `source` if `images` is None. `a.jpg`, `./a.jpg`,
    `b/../a.jpg` and the absolute path are the same file; links to a file are files of their own.

    Raises:
        DataError: no image has a caption, or none of the first few images exists.
    """
    folder = Path(source).parent if images is None else image_folder(images)
    spelling = Spelling(folder)
    captions: dict[Path, list[str]] = {}
    identities = Identities()
    names: dict[Path, str] = {}
    for row in rows:
        path = spelling.plain(row.image)
        names.setdefault(path, row.image)
        identities.join(path, row.identity)
        captions.setdefault(path, []).extend(clean_captions(row.captions, row.image, report))
    records = []
    for path, texts in captions.items():
        name, identity = names[path], identities.number(path)
        if not texts:
            report.skip("no captions", name)
            continue
        report.add(len(texts))
        records.append(Record(image=folder / name, captions=tuple(texts), identity=identity, name=name, split=split))
    if not records:
        where = "" if split is None else f" in split {split!r}"
        raise DataError(f"{source}: no image with a caption{where} ({report.summary()})")
    check_images_exist([Path(str(record.image)) for record in records[:PROBED]], source)
    return records


class Spelling:
    """One spelling for every path of a file; of `..` and absolute paths, folders are looked up, each of them once.

    Example:
        >>> from loopitr.data.files import Spelling
        >>> spelling = Spelling("photos")
        >>> spelling.plain("a.jpg") == spelling.plain("b/../a.jpg")
        True
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._real: dict[str, str] = {}

    def plain(self, image: str) -> Path:
        """The path with as few steps as possible, starting at the folder if the image is in it."""
        path = self.folder / image
        if ".." not in image and not os.path.isabs(image):
            return path
        try:
            directory = self._real_path(str(path.parent))
            inside = os.path.relpath(directory, self._real_path(str(self.folder)))
        except (OSError, ValueError):  # for a path with a zero byte
            return path
        return (Path(directory) if inside.split(os.sep)[0] == ".." else self.folder / inside) / path.name

    def _real_path(self, directory: str) -> str:
        if directory not in self._real:
            self._real[directory] = os.path.realpath(directory)
        return self._real[directory]
