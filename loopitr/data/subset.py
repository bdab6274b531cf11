"""Views of lazy records: some of them, or those of one image as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .image_sizes import image_sizes
from .records import LazyRecords, Record, caption_count, captions_of, identity_of, name_of, relevance_of, split_key_of


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


class ByImage(Subset):
    """The records of each group as one, with all their captions: a table may repeat an image for each caption."""

    def __init__(self, records: Sequence[Record], groups: Sequence[Sequence[int]]) -> None:
        super().__init__(records, [group[0] for group in groups])
        self.groups = groups

    def read(self, index: int) -> Record:
        return replace(super().read(index), captions=self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(caption for position in self.groups[index] for caption in captions_of(self.records, position))

    def caption_count(self, index: int) -> int:
        return sum(caption_count(self.records, position) for position in self.groups[index])


def one_per_image(records: Sequence[Record]) -> Sequence[Record]:
    """The records with those of equal identity as one, as a gallery wants them: each image once.

    An image that stands there once for each of its captions would count as several wrong answers to other queries.
    """
    groups: dict[int, list[int]] = {}
    for index in range(len(records)):
        groups.setdefault(identity_of(records, index), []).append(index)
    return records if len(groups) == len(records) else ByImage(records, list(groups.values()))
