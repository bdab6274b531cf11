"""Sources that `datasets.load_dataset` reads: hub ids, imagefolder, parquet, WebDataset tars; mapped or streamed.

Images stay encoded until a DataLoader worker decodes them. `datasets` is imported when it is first used, since that
takes seconds.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import (
    Columns,
    any_json,
    choose_columns,
    choose_image_column,
    dotted_value,
    image_value,
)
from .hub_stream import KEYS, URL, HubStream, one_line
from .image_facts import image_facts
from .image_sizes import file_size
from .records import DataError, LazyRecords, Record
from .report import LoadReport, clean_captions
from .tars import tar_fault

if TYPE_CHECKING:
    import datasets

TARS = "webdataset"  # the name of this format in `datasets`
DataFiles = str | list[str] | dict[str, str] | None


def load_hub(
    path: str,
    split: str,
    report: LoadReport,
    image_column: str | None = None,
    caption_column: str | None = None,
    name: str | None = None,
    data_files: DataFiles = None,
    streaming: bool = False,
) -> HubRecords | HubStream:
    """Records of one split.

    A local tar file that is incomplete or damaged is counted and named in `report`.

    Args:
        path: a hub id, a local folder, or the name of a format, with `data_files`.
        report: counts what was read and what was skipped.
        image_column, caption_column: None: guessed from usual names. `caption_column` may name a field of a struct
            (`json.captions`).
        name: the configuration of the data set.

    Raises:
        DataError: `datasets` cannot load the source, it has no such split, or the columns are unclear.
    """
    source = f"{path if data_files is None else data_files}[{split}]"
    # The types of a WebDataset are inferred from its first samples; a stream reads these without preparing the rest.
    dataset = _load(path, split, name, data_files, streaming or path == TARS)
    features = dataset.features
    if features is None:  # The stream has no types; its first row shows the columns.
        features = dict.fromkeys(next(iter(dataset), {}))
    columns = choose_columns(source, features, image_column, caption_column)
    if dataset.info.builder_name == TARS:
        features = any_json(features, columns.caption_root)
        dataset = _load(path, split, name, data_files, streaming, features=features)
    dataset = _undecoded(dataset, columns, features)
    if streaming:
        files = _local_files(path, split, data_files)
        return HubStream(dataset=dataset, columns=columns, source=source, split=split, report=report, files=files)
    folder = path if os.path.isdir(path) else None
    return HubRecords(dataset, columns=columns, source=source, split=split, report=report, folder=folder)


def load_images(
    path: str, split: str, image_column: str | None = None, data_files: DataFiles = None
) -> tuple[datasets.Dataset, str]:
    """One split with all its columns, images left encoded, and the name of its image column.

    Raises:
        DataError: as `load_hub`.
    """
    import datasets

    dataset = _load(path, split, None, data_files, streaming=False)
    column = choose_image_column(f"{path}[{split}]", dataset.features, image_column)
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset, column


def _load(path: str, split: str, name: str | None, data_files: DataFiles, streaming: bool, features: Any = None) -> Any:
    import datasets

    named = path if data_files is None else f"{path} with data_files {data_files}"

    def load(wanted: str | None) -> Any:
        return datasets.load_dataset(
            path, name=name, data_files=data_files, split=wanted, streaming=streaming, features=features
        )

    try:
        return load(split)
    except Exception as error:  # Builders raise errors of pyarrow, fsspec, tarfile and their own.
        splits = None
        if isinstance(error, ValueError) and "split" in str(error).lower():
            with contextlib.suppress(Exception):  # If this fails too, the first error is reported.
                splits = list(load(None))
        if splits is not None and split.split("[")[0] not in splits:
            raise DataError(f"{named}: no split {split!r}; it has {', '.join(map(str, splits))}") from error
        raise DataError(f"{named}: datasets cannot load it: {one_line(error)}") from error


def _local_files(path: str, split: str, data_files: DataFiles) -> tuple[str, ...]:
    """The local files that a source is read from, as far as they show without asking `datasets`, sorted by path."""
    if data_files is None:
        return tuple(sorted(str(file) for file in Path(path).rglob("*") if file.is_file()))
    named = data_files.get(split.split("[")[0], ()) if isinstance(data_files, dict) else data_files
    patterns = [named] if isinstance(named, str) else named
    return tuple(sorted(file for pattern in patterns for file in glob.glob(pattern, recursive=True)))


@contextlib.contextmanager
def from_cache_alone() -> Iterator[None]:
    """A context in which hub ids are read from the cache of `datasets`, and nothing is downloaded."""
    import datasets

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _undecoded(dataset: Any, columns: Columns, features: Any) -> Any:
    """The dataset with only the columns that are read, with images left encoded."""
    import datasets

    keep = [columns.image, columns.caption_root, *(key for key in KEYS if key in features)]
    dataset = dataset.select_columns(list(dict.fromkeys(keep)))
    if isinstance(features[columns.image], datasets.Image):
        dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
    return dataset


class HubRecords(LazyRecords):
    """The rows of a map-style dataset that have an image and a caption; only row numbers are held in memory.

    A record's identity is the number of the first row with the same image, by its stored bytes or else by its path.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        columns: Columns,
        source: str,
        split: str,
        report: LoadReport,
        folder: str | None = None,
    ) -> None:
        """`folder` is that of local data."""
        self.source, self.split = source, split
        self.folder = None if folder is None else os.path.abspath(folder)
        self._columns = columns
        self._dataset = dataset
        self._texts = dataset.select_columns([columns.caption_root])
        self._keys = dataset.select_columns(list(KEYS)) if set(KEYS) <= set(dataset.column_names) else None
        self._images = image_facts(dataset, columns.image)
        missing = self._images.missing
        for tar in [] if self._keys is None else dataset.data.column(URL).unique().to_pylist():
            if fault := tar_fault(tar):
                report.skip(fault, tar)
        rows, counts = [], []
        position = 0
        for batch in self._texts.iter(batch_size=1000):
            for cell in batch[columns.caption_root]:
                skips = LoadReport()
                captions = self._clean({columns.caption_root: cell}, f"{source} row {position}", skips)
                if missing[position] or not captions:
                    skips.skip("no image" if missing[position] else "no captions", "")
                if skips.counts:  # Names are looked up only for these rows, because that takes time.
                    report.merge_skips(skips, self._row_name(position))
                if captions and not missing[position]:
                    report.add(len(captions))
                    rows.append(position)
                    counts.append(len(captions))
                position += 1
        if not rows:
            raise DataError(f"{source}: no image with a caption in column {columns.caption!r} ({report.summary()})")
        self._rows, self._counts = np.array(rows), np.array(counts)
        self[0]  # This makes a column of the wrong type fail here, not in a worker.

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, count: int) -> HubRecords:
        """The first `count` records."""
        first = object.__new__(HubRecords)
        first.__dict__.update(self.__dict__, _rows=self._rows[:count], _counts=self._counts[:count])
        return first

    def read(self, index: int) -> Record:
        name = self.name(index)
        row = self._dataset[int(self._rows[index])]
        image = image_value(row[self._columns.image], name) or b""  # The decoder reports empty bytes as unreadable.
        return Record(
            image=image,
            captions=self._clean(row, name, LoadReport()),
            identity=self.identity(index),
            name=name,
            split=self.split,
        )

    def captions(self, index: int) -> tuple[str, ...]:
        return self._clean(self._texts[int(self._rows[index])], self.source, LoadReport())

    def caption_count(self, index: int) -> int:
        return int(self._counts[index])

    def identity(self, index: int) -> int:
        return int(self._images.identities[self._rows[index]])

    def image_key(self, index: int) -> int:
        return self.identity(index)

    def name(self, index: int) -> str:
        return self._row_name(int(self._rows[index]))

    def split_key(self, index: int) -> str:
        row = int(self._images.identities[self._rows[index]])  # the first with this image
        if self._keys is not None:
            keys = self._keys[row]
            return f"{os.path.basename(keys['__url__'])}::{keys['__key__']}"
        path = None if self._images.paths is None else self._images.paths[row].as_py()
        inside = os.path.relpath(path, self.folder) if path and self.folder and os.path.isabs(path) else ".."
        return f"row {row}" if inside.startswith("..") else Path(inside).as_posix()

    def image_sizes(self) -> np.ndarray:
        sizes = self._images.sizes[self._rows]  # a copy
        if self._images.paths is not None:
            for index in np.flatnonzero(sizes < 0):
                sizes[index] = file_size(self._images.paths[int(self._rows[index])].as_py())
        return sizes

    @property
    def fingerprint(self) -> str:
        # The end of the Arrow file's path is a hash of the data files and the options, made by `datasets`.
        return "|".join("/".join(Path(file["filename"]).parts[-4:]) for file in self._dataset.cache_files)

    def _clean(self, row: dict[str, Any], name: str, report: LoadReport) -> tuple[str, ...]:
        return clean_captions(dotted_value(row, self._columns.caption, self._columns.caption_root), name, report)

    def _row_name(self, row: int) -> str:
        if self._keys is not None:
            keys = self._keys[row]
            return f"{keys['__url__']}::{keys['__key__']}"
        path = None if self._images.paths is None else self._images.paths[row].as_py()
        return path if path and "/" in path else f"{self.source} row {row}" + (f" ({path})" if path else "")
