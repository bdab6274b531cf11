"""What `datasets` streams, as records: read in order, in parts, shuffled in a buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .columns import Columns, dotted_value, image_value
from .records import DataError, LoadReport, Record, clean_captions, printable, stable_hash
from .tars import tar_fault

URL = "__url__"
KEYS = (URL, "__key__")  # These columns of `datasets` name a WebDataset sample.


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
                raise DataError(f"{self.source}: cannot read on after row {number}: {one_line(error)}") from error
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


def one_line(error: BaseException) -> str:
    """What went wrong in `datasets`, in one line."""
    cause = error.__cause__ or error  # `DatasetGenerationError` hides what went wrong in its cause.
    return printable(next(iter(str(cause).splitlines()), "")) or type(cause).__name__
