"""The images of a `datasets` source for an index: files by path, and images stored in the source by row."""

from __future__ import annotations

import glob
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loopitr.data.columns import image_value
from loopitr.data.hub import DataFiles, load_images

from .sources import Source, free_names, shown
from .stamps import Stamp, stamp_of


@dataclass
class HubSource(Source):
    """The rows of a `datasets` split that have an image, with their columns of numbers and text."""

    dataset: Any = None
    image_column: str = "image"
    name_of_source: str = ""
    rows: list[int] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    files: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._others = self.dataset.select_columns(
            [name for name, feature in self.dataset.features.items() if name != self.image_column and _is_kept(feature)]
        )
        self._names = free_names(self._others.column_names, self.name_of_source)
        self._images = self.dataset.select_columns([self.image_column])
        row = 0
        for batch in self._images.iter(batch_size=100):
            for cell in batch[self.image_column]:
                self._look_at(row, cell)
                row += 1

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, position: int) -> str:
        file = self.files[position]
        return self._row_name(self.rows[position]) if file is None else shown(file)

    def file(self, position: int) -> bytes:
        file = self.files[position]
        return b"" if file is None else os.fsencode(file)

    def stamp(self, position: int) -> Stamp:
        return self.stamps[position]

    def columns(self, position: int) -> Mapping[str, Any]:
        row = self._others[self.rows[position]] if self._others.column_names else {}
        named = {self._names[name]: value for name, value in row.items()}
        return {name: _lines(value) if isinstance(value, list) else value for name, value in named.items()}

    def image(self, position: int) -> str | bytes:
        file = self.files[position]
        if file is not None:
            return file
        return image_value(self._images[self.rows[position]][self.image_column], self.name(position)) or b""

    def _look_at(self, row: int, cell: Any) -> None:
        image = image_value(cell, self._row_name(row))
        if image is None:
            self.skipped.append((self._row_name(row), "no image"))
            return
        file = os.path.abspath(image) if isinstance(image, str) else None
        stamp = (len(image), 0 if isinstance(image, str) else zlib.crc32(image))  # There is no time of a change.
        if file is not None:
            try:
                stamp = stamp_of(os.stat(file))
            except OSError as error:
                self.skipped.append((shown(file), error.strerror or type(error).__name__))
                return
        self.rows.append(row)
        self.stamps.append(stamp)
        self.files.append(file)

    def _row_name(self, row: int) -> str:
        return f"{self.name_of_source} row {row}"


def hub_source(path: str, split: str, image_column: str | None = None, data_files: DataFiles = None) -> HubSource:
    """The images of one split. `path` is a hub id, a local folder, or the name of a format, with `data_files`.

    Raises:
        DataError: `datasets` cannot load the source, it has no such split, or the image column is unclear.
    """
    dataset, column = load_images(path, split, image_column, data_files)
    place = _absolute(path)
    named = place if data_files is None else f"{place} {_absolute(data_files)}"
    return HubSource(dataset=dataset, image_column=column, name_of_source=f"{named}[{split}]")


def _absolute(files: Any) -> Any:
    """Local paths and patterns made absolute, as two folders may have files of the same name; hub ids as they are."""
    if isinstance(files, dict):
        return {name: _absolute(file) for name, file in files.items()}
    if isinstance(files, list):
        return [_absolute(file) for file in files]
    is_here = os.path.exists(files) or any(glob.iglob(files))
    return os.path.abspath(files) if is_here else files


def _lines(texts: list[str | None]) -> str:
    return "\n".join(text for text in texts if text is not None)


def _is_kept(feature: Any) -> bool:
    """Whether a column is kept: numbers, text and lists of text are."""
    inner = getattr(feature, "feature", feature)
    kind = str(getattr(inner, "dtype", ""))
    is_text = kind in ("string", "large_string")
    return is_text or (inner is feature and kind.startswith(("int", "uint", "float", "bool")))
