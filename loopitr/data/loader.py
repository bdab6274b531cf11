"""Training batches: the rows that each rank reads, in order, and the loader that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from .collate import Batch, Collator
from .dataset import CaptionDataset, EpochSampler, StreamDataset
from .records import printable
from .report import LoadReport
from .workers import leave_signals_to_the_run


class ShardedBatchSampler(Sampler[list[tuple[int, int]]]):
    """One rank's share of each global batch; rows that do not fill `accumulation` global batches are left out.

    For the same `batch_size * num_ranks`, the rows of a global batch do not depend on the number of ranks. For
    resuming, `start` skips batches without reading their data.
    """

    def __init__(
        self, sampler: EpochSampler, *, batch_size: int, rank: int, num_ranks: int, accumulation: int = 1
    ) -> None:
        self.sampler, self.batch_size, self.rank, self.num_ranks = sampler, batch_size, rank, num_ranks
        self.accumulation = accumulation
        self.start = 0

    def __len__(self) -> int:
        return self._full(len(self.sampler) // (self.batch_size * self.num_ranks))

    def _full(self, batches: int) -> int:
        return batches // self.accumulation * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = list(self.sampler)
        for batch in range(self.start, self.start + self._full(len(self) - self.start)):
            first = (batch * self.num_ranks + self.rank) * self.batch_size
            yield rows[first : first + self.batch_size]


class EpochLoader:
    """The batches of an epoch, from any batch on: `for batch in loader.epoch(3, start=10)`."""

    def __init__(
        self,
        dataset: CaptionDataset | StreamDataset,
        collator: Collator,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        num_ranks: int,
        num_workers: int,
        pin_memory: bool,
        group: int = 1,
        accumulation: int = 1,
    ) -> None:
        """
        Args:
            accumulation: the number of batches of an optimiser step. An epoch has no batch that does not fill a step,
                except for a stream: FSDP would add its gradient to that of the next epoch's first step.
        """
        self.dataset = dataset
        common: dict[str, Any] = {
            "collate_fn": collator,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            # The loader has its own generator, because drawing the workers' seeds must not advance the global one,
            # which dropout uses: a resumed run would then differ from an uninterrupted one.
            "generator": torch.Generator().manual_seed(seed),
            "worker_init_fn": leave_signals_to_the_run,
        }
        if isinstance(dataset, StreamDataset):
            self.sampler = None
            self.loader = DataLoader(dataset, batch_size=batch_size, drop_last=True, **common)
        else:
            self.sampler = ShardedBatchSampler(
                EpochSampler(len(dataset), seed=seed, group=group),
                batch_size=batch_size,
                rank=rank,
                num_ranks=num_ranks,
                accumulation=accumulation,
            )
            self.loader = DataLoader(dataset, batch_sampler=self.sampler, persistent_workers=num_workers > 0, **common)

    def __len__(self) -> int:
        """The number of batches in an epoch.

        Raises:
            TypeError: the data is a stream, whose length is unknown.
        """
        if self.sampler is None:
            raise TypeError("streaming data has no length")
        return len(self.sampler)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ... of an epoch."""
        if self.sampler is not None:
            self.sampler.start = start
            self.sampler.sampler.set_epoch(epoch)
            yield from self.loader
            return
        self.dataset.set_epoch(epoch)  # type: ignore[union-attr]
        for index, batch in enumerate(self.loader):
            if index >= start:  # A stream can only be read from its start.
                yield batch


class SkipCounter:
    """Counts the examples of a run that could not be read, logs the first of them, and stops the run if there are many.

    Attributes:
        report: counts each name once.
        files: the reason by name; `known` has those counted before the run was resumed.
        visits: counts a name at each visit.
        seen: the number of examples visited, skipped ones included.
    """

    def __init__(
        self, *, max_fraction: float, log: Callable[[str], None], known: Mapping[str, str] | None = None
    ) -> None:
        self.max_fraction, self.log = max_fraction, log
        self.report, self.visits = LoadReport(), LoadReport()
        self.files: dict[str, str] = dict(known or {})
        self.batches = self.seen = self.truncated = 0

    def update(self, batch: Batch) -> None:
        """Count a batch, and log the first examples that could not be read.

        Raises:
            DataError: more than `max_fraction` of at least 100 examples were unreadable.
        """
        self.truncated += batch.truncated
        self.batches += 1
        self.seen += len(batch.inputs["input_ids"]) + len(batch.skipped)
        for name, reason in batch.skipped:
            self.visits.skip(reason, name)
            if name in self.files:
                continue
            self.files[name] = reason
            self.report.skip(reason, name)
            if self.report.skipped <= 10:
                self.log(f"skipped {printable(name)}: {reason}")
        if self.seen >= 100:
            self.visits.check(self.max_fraction, seen=self.seen)
