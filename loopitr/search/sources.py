"""Sources of images for an index: a folder or a table (`hub_source.py` has `datasets` sources)."""

from __future__ import annotations

import os
import re
import stat
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from loopitr.data import DataError, stable_hash
from loopitr.data.table import DELIMITERS, JSON_LINES, captions_of_cell, read_table
from loopitr.reading import user_path

from .manifest import MANIFEST
from .stamps import Stamp, stamp_of

RESERVED = ("id", "file", "path", "size", "mtime", "width", "height", "embed")
INTEGER, MOST_DIGITS = re.compile(r"[+-]?\d+"), 40
PADDED = re.compile(r"[+-]?0\d+")  # an article number or a postcode
TABLES = (*DELIMITERS, *JSON_LINES)


@dataclass
class Source:
    """A sequence of images. `skipped` has (path, reason) of those that are known to be unreadable without opening."""

    skipped: list[tuple[str, str]] = field(default_factory=list)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, position: int) -> str:
        """The path as text, for display."""

    @abstractmethod
    def file(self, position: int) -> bytes:
        """The bytes of the path; empty if the image is not a file."""

    @abstractmethod
    def stamp(self, position: int) -> Stamp:
        """A value that changes when the image does."""

    @abstractmethod
    def columns(self, position: int) -> Mapping[str, Any]:
        """Other columns to index, such as a caption; what an index has in a column that is not given stays."""

    @abstractmethod
    def image(self, position: int) -> str | bytes:
        """The path or the encoded bytes of the image."""

    def id(self, position: int) -> int:
        """The id of the image in the index."""
        return image_id(self.file(position) or self.name(position).encode())


def image_id(key: bytes) -> int:
    """An id of 63 bits for the bytes of a path."""
    return stable_hash(key) & (2**63 - 1)


def shown(path: str) -> str:
    """A path as text, in which bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass
class FileSource(Source):
    """Images that are files: absolute `paths`, their `stamps`, and `rows` of other columns."""

    paths: list[str] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    rows: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        return shown(self.paths[position])

    def file(self, position: int) -> bytes:
        return os.fsencode(self.paths[position])

    def stamp(self, position: int) -> Stamp:
        return self.stamps[position]

    def columns(self, position: int) -> Mapping[str, Any]:
        return {} if self.rows is None else self.rows[position]

    def image(self, position: int) -> str | bytes:
        return self.paths[position]

    def look_at(self, path: str, row: dict[str, Any] | None = None) -> None:
        """Add a path with its other columns, or skip it with a reason if it is not a file."""
        try:
            status = os.stat(path)
        except OSError as error:
            self.skipped.append((shown(path), _reason(error)))
            return
        if not stat.S_ISREG(status.st_mode):
            self.skipped.append((shown(path), f"not a file but {_kind(status.st_mode)}"))
            return
        self.paths.append(path)
        self.stamps.append(stamp_of(status))
        if self.rows is not None:
            self.rows.append(row or {})


def folder_source(folder: str | Path) -> FileSource:
    """The images in a folder and its subfolders, by the suffixes of their names, in the order of their names.

    Links are followed, but each folder is visited only once. Hidden files and folders are left out, and so are search
    indexes.

    Raises:
        DataError: there is no such folder, or it cannot be read.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        raise DataError(f"{shown(str(folder))}: {'is not a folder' if os.path.exists(root) else 'no such folder'}")
    source = FileSource()
    endings = Image.registered_extensions()
    for path in _walk(root, source, set()):
        if os.path.splitext(path)[1].lower() in endings:
            source.look_at(path)
    if not source.paths and (shown(root), "Permission denied") in source.skipped:
        raise DataError(f"{shown(root)}: Permission denied")
    return source


def _walk(root: str, source: FileSource, seen: set[tuple[int, int]]) -> Iterator[str]:
    """The files under `root`, in order, without recursion, so that the depth of folders has no limit."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as scan:
                entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            source.skipped.append((shown(folder), _reason(error)))
            continue
        if folder != root and any(entry.name == MANIFEST for entry in entries):
            continue
        inner: list[tuple[bool, str]] = []
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # A link may lead to itself.
                is_folder = False
            if is_folder:
                inner.append((entry.is_symlink(), entry.path))
            else:
                yield entry.path
        # Folders come before links, so that a folder is listed under its own name and not under that of a link.
        waiting += [path for _, path in sorted(inner, reverse=True)]


def table_source(path: str | Path, images: str | Path | None = None, image_column: str = "image") -> FileSource:
    """The images that a CSV, TSV or JSON-lines file names, with its other columns.

    Relative paths start at `images`, or at the folder of the table. Rows of the same image are joined: its captions,
    and other texts that differ, become one text with a line for each. `free_names` says what columns are called.

    Raises:
        DataError: the table cannot be read, lacks the column, or has two columns that would get the same name.
    """
    rows, columns = read_table(path)
    if image_column not in columns:
        raise DataError(f"{path}: no column {image_column!r}; it has {', '.join(columns) or 'none'}")
    folder = Path(path).parent if images is None else Path(images)
    source = FileSource(rows=[])
    rows_of_files: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows, start=1):
        image = row.pop(image_column)
        if not isinstance(image, str) or not image.strip() or "\0" in image:
            source.skipped.append((f"{Path(path).name} row {number}", "no image path"))
            continue
        rows_of_files.setdefault(os.path.abspath(folder / image.strip()), []).append(row)
    names = free_names([name for name in columns if name != image_column], str(path))
    types = {name: _type_of([row.get(name) for row in rows]) for name in names}
    for file, own in rows_of_files.items():
        cells = {name: _joined([row.get(name) for row in own], kind) for name, kind in types.items()}
        source.look_at(file, {names[name]: cell for name, cell in cells.items()})
    return source


def open_source(source: str | Path, images: str | Path | None = None, image_column: str = "image") -> Source:
    """The source for a table, recognised by its suffix, or for a folder.

    Raises:
        DataError: it is neither, cannot be read, or has no image.
    """
    path = user_path(source)
    images = None if images is None else user_path(images)
    is_table = path.suffix.lower() in TABLES and not path.is_dir()
    opened = table_source(path, images, image_column) if is_table else folder_source(path)
    check_images(opened, shown(str(source)))
    return opened


def check_images(source: Source, name: str) -> None:
    """Check that a source has images; `name` is what an error calls it.

    Raises:
        DataError: it has none.
    """
    if len(source):
        return
    skipped = [": ".join(each) for each in source.skipped[:1]]
    first = f"; the first of {len(source.skipped)} skipped is {skipped[0]}" if skipped else ""
    raise DataError(f"{name}: there is no image to index{first}")


def free_names(columns: Sequence[str], source: str) -> dict[str, str]:
    """The names in an index of a source's columns; `source` is what an error calls it.

    A column with the name of one of the index's own, or with a leading underscore, as LanceDB's own have, gets an
    underscore after its name. A dot, which would name a part of a column, and a backtick become underscores; a column
    without a name, such as that of pandas' row numbers, is `unnamed`.

    Raises:
        DataError: two columns get the same name.
    """
    names: dict[str, str] = {}
    for column in columns:
        name = re.sub(r"[.`\0]", "_", column).encode("utf-8", "backslashreplace").decode() or "unnamed"
        name = f"{name}_" if name in RESERVED or name.startswith("_") else name
        other = next((other for other, given in names.items() if given == name), None)
        if other is not None:
            both = f"columns {other!r} and {column!r} would both be {name!r} in the index"
            raise DataError(f"{source}: {both}; rename one of them")
        names[column] = name
    return names


def _joined(values: Sequence[Any], kind: type) -> Any:
    cells = [value for value in values if value is not None and value != ""]
    if not cells:
        return None
    if kind is str:
        text = "\n".join(dict.fromkeys(text for cell in cells for text in _texts(cell)))
        return text.encode("utf-8", "backslashreplace").decode()  # JSON may have halves of characters.
    return str(cells[0]).strip().lower() == "true" if kind is bool else kind(cells[0])


def _texts(cell: Any) -> list[str]:
    texts = captions_of_cell(cell)
    return [str(text) for text in texts if text is not None] if isinstance(texts, (list, tuple)) else [str(texts)]


def _type_of(values: Sequence[Any]) -> type:
    """The type of all cells of a column: bool, int (of 64 bits), float, or else text."""
    cells = [str(value).strip() for value in values if value is not None and value != ""]
    if cells and all(cell.lower() in ("true", "false") for cell in cells):
        return bool
    if any(PADDED.fullmatch(cell) for cell in cells):
        return str  # A number would not keep the zeros.
    if cells and any(INTEGER.fullmatch(cell) and not -(2**63) <= int(cell[:MOST_DIGITS]) < 2**63 for cell in cells):
        return str  # A float would not keep all digits.
    kinds: tuple[type[int], type[float]] = (int, float)
    for kind in kinds:
        try:
            if cells and all(kind(cell) is not None for cell in cells) and not any("_" in cell for cell in cells):
                return kind
        except ValueError:
            pass
    return str


def _reason(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else error.strerror or type(error).__name__


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISDIR, "a folder"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")
