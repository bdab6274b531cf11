"""A subset of lazy records."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from .image_sizes import image_sizes
from .records import LazyRecords, Record, captions_of, identity_of, image_key_of, name_of, relevance_of, split_key_of


class Subset(LazyRecords):
    """The records at `positions` of other records, in that order, read on access."""

    def __init__(self, records: Sequence[Record], positions: list[int]) -> None:
        self.records, self.positions = records, positions

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, index: int) -> Record:
        return self.records[self.positions[index]]

    def captions(self, index: int) -> tuple[str, ...]:
        return captions_of(self.records, self.positions[index])

    def identity(self, index: int) -> int:
        return identity_of(self.records, self.positions[index])

    def image_key(self, index: int) -> Hashable:
        return image_key_of(self.records, self.positions[index])

    def name(self, index: int) -> str:
        return name_of(self.records, self.positions[index])

    def split_key(self, index: int) -> str:
        return split_key_of(self.records, self.positions[index])

    def image_sizes(self) -> Any:
        sizes = image_sizes(self.records)
        return None if sizes is None else sizes[self.positions]

    def relevance(self, positions: Sequence[int]) -> Any:  # a tensor; torch is not imported here
        return relevance_of(self.records, [self.positions[index] for index in positions])

    @property
    def fingerprint(self) -> str:
        return getattr(self.records, "fingerprint", "")
