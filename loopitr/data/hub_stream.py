"""Records streamed by `datasets`: read in order, split into shards, shuffled in a buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .columns import Columns, dotted_value, image_value
from .records import DataError, Record, printable, stable_hash
from .report import LoadReport, clean_captions
from .tars import tar_fault

URL = "__url__"
KEYS = (URL, "__key__")  # These columns of `datasets` name a WebDataset sample.


@dataclass(kw_only=True)
class HubStream:
    """An iterable of records in the order of their rows; `shard` splits it, `shuffle` shuffles it in a buffer.

    A stream has no row numbers that all shards agree on, so a record's identity is a hash of the image (its bytes, or
    else its path). Shards are whole files if their number is divisible by that of the shards, otherwise every n-th row.
    Shards may differ in length, so training on several ranks should count steps, not epochs. `files` are the local
    files that it reads.
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
    files: tuple[str, ...] = ()

    def shard(self, num_shards: int, index: int) -> HubStream:
        """Part `index` of `num_shards` disjoint parts of this stream."""
        if not 0 <= index < num_shards:
            raise ValueError(f"shard index must be in [0, {num_shards}), got {index}")
        return replace(self, num_shards=self.num_shards * num_shards, shard_index=self.shard_index * num_shards + index)

    def shuffle(self, seed: int, buffer_size: int = 1000) -> HubStream:
        """This stream with rows drawn at random from `buffer_size` rows held in memory."""
        return replace(self, shuffle_seed=seed, buffer_size=buffer_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, which decides the order of a shuffled stream."""
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
        checked_tars: set[str] = set()
        for number in itertools.count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # Damaged tar and parquet files raise errors of many kinds.
                raise DataError(f"{self.source}: cannot read on after row {number}: {one_line(error)}") from error
            tar = row.get(URL)
            if tar is not None and tar not in checked_tars:
                checked_tars.add(tar)
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
        # All shards shuffle the same rows with the same seed, so taking every n-th row still makes disjoint shards.
        # In a DataLoader worker, `iter(dataset)` would split the files among the workers again; `.iter()` does not.
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


def one_line(error: BaseException) -> str:
    """An error of `datasets` in one line."""
    cause = error.__cause__ or error  # The message of a `DatasetGenerationError` is in its cause.
    return printable(next(iter(str(cause).splitlines()), "")) or type(cause).__name__
