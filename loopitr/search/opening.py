"""Opens the images of a source in worker processes, in batches and in order."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from loopitr.data import DataError, UnreadableImage, decode_image
from loopitr.evaluation.gallery import Transform

from .sources import Source


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A batch of images: their `positions`, `pixels [b, 3, S, S]` and upright `sizes` (width, height).

    `failed` has (position, reason) of images that cannot be opened.
    """

    positions: list[int]
    pixels: Tensor
    sizes: list[tuple[int, int]]
    failed: list[tuple[int, str]]


class _Images(Dataset[tuple[int, Tensor, tuple[int, int]] | tuple[int, str]]):
    def __init__(self, source: Source, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, position: int) -> tuple[int, Tensor, tuple[int, int]] | tuple[int, str]:
        try:
            image = decode_image(self.source.image(position), self.source.name(position))
            return position, self.transform(image), image.size
        except UnreadableImage as error:
            return position, error.reason
        except DataError as error:
            return position, str(error)


def _together(items: list[tuple[int, Tensor, tuple[int, int]] | tuple[int, str]]) -> Opened:
    good = [item for item in items if len(item) == 3]
    return Opened(
        positions=[position for position, _, _ in good],
        pixels=torch.stack([pixels for _, pixels, _ in good]) if good else torch.empty(0),
        sizes=[size for _, _, size in good],
        failed=[(item[0], item[1]) for item in items if len(item) == 2],
    )


def opened(
    source: Source, positions: Sequence[int], transform: Transform, *, batch_size: int, num_workers: int | None
) -> Iterator[Opened]:
    """Open the images at `positions`, in `num_workers` processes; 0: only in this one, None: one per core."""
    batches = [list(positions[start : start + batch_size]) for start in range(0, len(positions), batch_size)]
    workers = cores() if num_workers is None else num_workers
    loader = DataLoader(
        _Images(source, transform),
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_together,
        generator=torch.Generator(),  # The global generator is not advanced.
    )
    with warnings.catch_warnings():
        # The warning does not apply: the workers do not use LanceDB, and it is not in use while they start.
        warnings.filterwarnings("ignore", message="lancedb fork support")
        batches_of_workers = iter(loader)
    yield from batches_of_workers


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
