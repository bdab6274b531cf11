"""Opens and encodes the images of a source in threads or worker processes, in batches and in order."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from loopitr.data import DataError, UnreadableImage, decode_image
from loopitr.evaluation.gallery import Transform
from loopitr.evaluation.side_by_side import Shares, side_by_side

from .sources import FileSource, Source

Made = TypeVar("Made")


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


def opened_and_encoded(
    source: Source,
    positions: Sequence[int],
    transform: Transform,
    encode: Callable[[Opened], Made],
    *,
    shares: Shares,
    num_workers: int | None,
) -> Iterator[Made]:
    """Open the images at `positions` and `encode` them, `shares.size` at a time, in order.

    Args:
        encode: may be called by several threads at once.
        num_workers: the number of processes that open images; 0: none but this one, None: one for each core, but none
            where several threads encode images, which open them too.
    """
    batches = [list(positions[start : start + shares.size]) for start in range(0, len(positions), shares.size)]
    if num_workers is None:
        num_workers = 0 if shares.encoders > 1 else cores()
    with warnings.catch_warnings():
        # The warning does not apply: the workers do not use LanceDB, and it is not in use while they start.
        warnings.filterwarnings("ignore", message="lancedb fork support")
        return side_by_side(
            _Images(source, transform),
            batches,
            _together,
            encode,
            shares=shares,
            num_workers=num_workers,
            open_in_threads=isinstance(source, FileSource),
        )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
