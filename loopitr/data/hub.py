"""Any source that `datasets.load_dataset` reads: hub ids, imagefolder, parquet, WebDataset tars; mapped or streamed.

Images stay encoded until a DataLoader worker decodes them. `datasets` is imported when it is first used, since its
import lasts seconds.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import (
    Columns,
    any_json,
    choose_columns,
    choose_image_column,
    dotted_value,
    image_facts,
    image_value,
)
from .records import DataError, LazyRecords, LoadReport, Record, clean_captions, printable, stable_hash
from .tars import tar_fault

if TYPE_CHECKING:
    import datasets

URL = "__url__"
KEYS = (URL, "__key__")  # These columns of `datasets` name a WebDataset sample.
TARS = "webdataset"  # what `datasets` calls their format
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
    """Records of one split. `path` is a hub id, a local folder, or a format name beside `data_files`.

    `caption_column` may reach into a struct (`json.captions`). Left out, both columns are guessed from usual names.

    A local tar file that breaks off, or is broken in its middle, is a skip that is counted and named.

    Raises:
        DataError: `datasets` cannot load the source, it has no such split, or the columns are unclear.
    """
    source = f"{path if data_files is None else data_files}[{split}]"
    # Of tars the types are guessed from the first samples, which a stream shows without preparing all of them.
    dataset = _load(path, split, name, data_files, streaming or path == TARS)
    features = dataset.features
    if features is None:  # It is a stream of untyped rows, whose first one shows the columns.
        features = dict.fromkeys(next(iter(dataset), {}))
    columns = choose_columns(source, features, image_column, caption_column)
    if dataset.info.builder_name == TARS:
        features = any_json(features, columns.caption_root)
        dataset = _load(path, split, name, data_files, streaming, features=features)
    dataset = _undecoded(dataset, columns, features)
    if streaming:
        return HubStream(dataset=dataset, columns=columns, source=source, split=split, report=report)
    return HubRecords(dataset, columns=columns, source=source, split=split, report=report)


def load_images(
    path: str, split: str, image_column: str | None = None, data_files: DataFiles = None
) -> tuple[datasets.Dataset, str]:
    """One split with all its columns, images left encoded, and the name of its image column: captions are not needed.

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
            with contextlib.suppress(Exception):  # If this fails too, the first error is the one that says why.
                splits = list(load(None))
        if splits is not None and split.split("[")[0] not in splits:
            raise DataError(f"{named}: no split {split!r}; it has {', '.join(map(str, splits))}") from error
        raise DataError(f"{named}: datasets cannot load it: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ or error  # `DatasetGenerationError` hides what went wrong in its cause.
    return printable(next(iter(str(cause).splitlines()), "")) or type(cause).__name__


def _undecoded(dataset: Any, columns: Columns, features: Any) -> Any:
    """The dataset with only the columns that are read, its images left encoded."""
    import datasets

    keep = [columns.image, columns.caption_root, *(key for key in KEYS if key in features)]
    dataset = dataset.select_columns(list(dict.fromkeys(keep)))
    if isinstance(features[columns.image], datasets.Image):
        dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
    return dataset


class HubRecords(LazyRecords):
    """Rows of a map-style dataset that have an image and a caption; only row numbers are held in memory.

    A record's identity is its row; rows that name the same image (path, and size where bytes are stored) share one.
    """

    def __init__(
        self, dataset: datasets.Dataset, *, columns: Columns, source: str, split: str, report: LoadReport
    ) -> None:
        self.source, self.split = source, split
        self._columns = columns
        self._dataset = dataset
        self._texts = dataset.select_columns([columns.caption_root])
        self._keys = dataset.select_columns(list(KEYS)) if set(KEYS) <= set(dataset.column_names) else None
        self._paths, missing, self._identities = image_facts(dataset, columns.image)
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
                if skips.counts:  # A name costs a look-up, so that only these rows get one.
                    report.merge_skips(skips, self._row_name(position))
                if captions and not missing[position]:
                    report.add(len(captions))
                    rows.append(position)
                    counts.append(len(captions))
                position += 1
        if not rows:
            raise DataError(f"{source}: no image with a caption in column {columns.caption!r} ({report.summary()})")
        self._rows, self._counts = np.array(rows), np.array(counts)
        self[0]  # A column of the wrong type fails here, not in a worker.

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
        image = image_value(row[self._columns.image], name) or b""  # The decoder reports an empty cell.
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
        return int(self._identities[self._rows[index]])

    def name(self, index: int) -> str:
        return self._row_name(int(self._rows[index]))

    @property
    def fingerprint(self) -> str:
        # The end of the Arrow file's path is a hash that `datasets` makes of the data files and the options.
        return "|".join("/".join(Path(file["filename"]).parts[-4:]) for file in self._dataset.cache_files)

    def _clean(self, row: dict[str, Any], name: str, report: LoadReport) -> tuple[str, ...]:
        return clean_captions(dotted_value(row, self._columns.caption, self._columns.caption_root), name, report)

    def _row_name(self, row: int) -> str:
        if self._keys is not None:
            keys = self._keys[row]
            return f"{keys['__url__']}::{keys['__key__']}"
        path = None if self._paths is None else self._paths[row].as_py()
        return path if path and "/" in path else f"{self.source} row {row}" + (f" ({path})" if path else "")


@dataclass(kw_only=True)
class HubStream:
    """An iterable of records read in order; `shard` it by worker and rank, `shuffle` it through a buffer.

    Row numbers are unknown while streaming, so identity is a hash of the image (its bytes, or else its path).
    Shards are whole files where these divide evenly, otherwise every n-th row; lengths may differ by shard, so
    training on several ranks should count steps, not epochs.
    """

    dataset: Any
    columns: Columns
    source: str
    split: str
    report: LoadReport
    num_shards: int = 1
    shard_index: int = 0
    shuffle_seed: int | None = None
    buffer_size: int = 1000
    epoch: int = 0
    limit: int | None = None

    def shard(self, num_shards: int, index: int) -> HubStream:
        """Part `index` of `num_shards` parts of this stream, which have no row in common."""
        if not 0 <= index < num_shards:
            raise ValueError(f"shard index must be in [0, {num_shards}), got {index}")
        return replace(self, num_shards=self.num_shards * num_shards, shard_index=self.shard_index * num_shards + index)

    def shuffle(self, seed: int, buffer_size: int = 1000) -> HubStream:
        """The same stream, whose rows are drawn at random from `buffer_size` rows held in memory."""
        return replace(self, shuffle_seed=seed, buffer_size=buffer_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, where the stream is shuffled."""
        self.epoch = epoch

    def take(self, count: int) -> HubStream:
        """The first `count` rows of the whole stream, before sharding and shuffling."""
        return replace(self, limit=count)

    def __iter__(self) -> Iterator[Record]:
        for record in self.records(self.report.skip):
            self.report.add(len(record.captions))
            yield record

    def records(self, on_skip: Callable[[str, str], None]) -> Iterator[Record]:
        """Records of this shard; `on_skip(reason, name)` is called for every row or caption left out."""
        rows = self._rows()
        tars: set[str] = set()  # The ones that were looked at.
        for number in itertools.count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # A tar or parquet file broken in mid-stream raises any decoder's error.
                raise DataError(f"{self.source}: cannot read on after row {number}: {_one_line(error)}") from error
            tar = row.get(URL)
            if tar is not None and tar not in tars:
                tars.add(tar)
                if fault := tar_fault(tar):
                    on_skip(fault, tar)
            record = self._record(row, number, on_skip)
            if record is not None:
                yield record

    def _rows(self) -> Iterator[dict[str, Any]]:
        dataset = self.dataset if self.limit is None else self.dataset.take(self.limit)
        by_file = self.limit is None and dataset.num_shards % self.num_shards == 0
        if by_file and self.num_shards > 1:
            dataset = dataset.shard(self.num_shards, self.shard_index, contiguous=False)
        if self.shuffle_seed is not None:
            seed = stable_hash(f"{self.shuffle_seed}/{self.epoch}") & 0xFFFFFFFF
            dataset = dataset.shuffle(seed=seed, buffer_size=self.buffer_size)
        # Every shard shuffles the same rows with the same seed, so that every n-th row still belongs to one shard only.
        # In a DataLoader worker `iter(dataset)` would divide the files among the workers once more; `.iter()` does not.
        rows = ({name: cells[0] for name, cells in batch.items()} for batch in dataset.iter(batch_size=1))
        return rows if by_file else itertools.islice(rows, self.shard_index, None, self.num_shards)

    def _record(self, row: dict[str, Any], number: int, on_skip: Callable[[str, str], None]) -> Record | None:
        cell = row[self.columns.image]
        path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
        key = f"{row['__url__']}::{row['__key__']}" if set(KEYS) <= row.keys() else path
        name = key or f"{self.source} row {number} of shard {self.shard_index}/{self.num_shards}"
        report = LoadReport()
        captions = clean_captions(dotted_value(row, self.columns.caption, self.columns.caption_root), name, report)
        for reason, count in report.counts.items():
            for _ in range(count):
                on_skip(reason, name)
        image = image_value(cell, name)
        if image is None or not captions:
            on_skip("no image" if image is None else "no captions", name)
            return None
        return Record(image=image, captions=captions, identity=stable_hash(image), name=name, split=self.split)
