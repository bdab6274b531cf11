"""A cache of training images, decoded and shrunk once, and memory-mapped as bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .cache_folder import (
    build_once,
    check_space,
    damaged,
    expect_intact,
    images_digest,
    none_readable,
    read_images,
    read_meta,
    stored_digest,
)
from .records import DataError, Record


class ImageCache:
    """`cache[i]` is the uint8 pixels `[3, H, W]` of record i; `unreadable` has the reasons of records without any."""

    def __init__(self, folder: str | Path) -> None:
        """Open a finished cache. Each process maps the files on first use, so it can be passed to DataLoader workers.

        Raises:
            DataError: the folder is not an image cache, or is damaged.
        """
        self.folder = Path(folder)
        self._maps: tuple[np.ndarray, np.ndarray] | None = None
        with expect_intact(self.folder, "not an image cache"):
            meta = read_meta(self.folder)
            self.shortest: int = meta["shortest"]
            self.images_digest = stored_digest(meta)
            self.unreadable: dict[int, str] = {int(index): reason for index, reason in meta["unreadable"].items()}
        index, pixels = self._mapped()
        if index.ndim != 2 or index.shape[1] != 3 or int(index[:, 1:].prod(axis=1).sum()) * 3 != len(pixels):
            raise damaged(self.folder, f"{len(pixels)} bytes of pixels do not fit the index {index.shape}")

    @classmethod
    def open_or_build(
        cls,
        folder: str | Path,
        *,
        records: Sequence[Record],
        shortest: int,
        num_workers: int = 0,
        batch_size: int = 16,
        progress: bool = True,
    ) -> ImageCache:
        """Open `folder/<shortest>px-<images digest[:16]>`, building it first if it is not there.

        Images whose shorter side is above `shortest` pixels are shrunk to it; none is enlarged. Images are identified
        by name, path and size of the file in bytes, or by the pixels of a PIL image, so a replaced image makes another
        cache. `build_once` says what happens to interrupted and concurrent builds.
        """
        if shortest < 1:
            raise ValueError(f"shortest must be at least 1 pixel, got {shortest}")
        digest = images_digest(records)
        target = Path(folder) / f"{shortest}px-{digest[:16]}"

        def build(temporary: Path) -> dict[str, Any]:
            unreadable = _build(temporary, records, shortest, batch_size, num_workers, progress)
            return {"shortest": shortest, "images_digest": digest, "unreadable": unreadable}

        build_once(target, build)
        cache = cls(target)
        if cache.shortest != shortest or cache.images_digest != digest or len(cache) != len(records):
            raise DataError(f"{target}: made for another size or set of images; delete it")
        return cache

    def __len__(self) -> int:
        return len(self._mapped()[0])

    def __getitem__(self, index: int) -> Tensor:
        places, pixels = self._mapped()
        offset, height, width = places[index].tolist()
        values = np.array(pixels[offset : offset + 3 * height * width])  # a copy, since the map is read-only
        # Pixels are stored as [H, W, 3], since torch resizes a view of this faster than separate colour planes.
        return torch.from_numpy(values).view(height, width, 3).permute(2, 0, 1)  # [3, H, W]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}

    def _mapped(self) -> tuple[np.ndarray, np.ndarray]:
        """The index [R, 3] of offset, height and width (0 where unreadable), and the bytes of all pixels."""
        if self._maps is None:
            with expect_intact(self.folder, "cannot map the images"):
                index = np.load(self.folder / "index.npy", mmap_mode="r", allow_pickle=False)
                self._maps = index, np.memmap(self.folder / "pixels.bin", dtype=np.uint8, mode="r")
        return self._maps


@dataclass(frozen=True)
class _Batch:
    """The pixels of a batch in one tensor, since each tensor sent by a worker uses a file handle."""

    pixels: Tensor  # [bytes]
    sizes: list[tuple[int, int, int]]  # index, height, width
    failed: list[tuple[int, str]]  # index, reason


def _pack(items: list[tuple[int, Tensor | str]]) -> _Batch:
    good = [(index, pixels) for index, pixels in items if isinstance(pixels, Tensor)]
    return _Batch(
        torch.cat([torch.empty(0, dtype=torch.uint8), *(pixels.flatten() for _, pixels in good)]),
        [(index, pixels.shape[0], pixels.shape[1]) for index, pixels in good],
        [(index, reason) for index, reason in items if isinstance(reason, str)],
    )


@dataclass(frozen=True)
class _Shrink:
    """A PIL RGB image -> its uint8 pixels `[H, W, 3]`, shrunk so that its shorter side is at most `shortest`."""

    shortest: int

    def __call__(self, image: Image.Image) -> Tensor:
        scale = self.shortest / min(image.size)
        if scale < 1:
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.BICUBIC)  # Pillow antialiases when it shrinks an image.
        return torch.from_numpy(np.array(image))  # [H, W, 3]


def _build(
    folder: Path, records: Sequence[Record], shortest: int, batch_size: int, num_workers: int, progress: bool
) -> dict[int, str]:
    """Write index and pixels; returns the reasons of unreadable records."""
    loader = read_images(
        records,
        _Shrink(shortest),
        batch_size=batch_size,
        num_workers=num_workers,
        collate=_pack,
        # A JPEG decoded at no less than twice this size is as sharp after shrinking as one decoded at full size.
        shortest=2 * shortest,
    )
    index = np.zeros((len(records), 3), dtype=np.int64)
    unreadable: dict[int, str] = {}
    read = written = 0
    with (folder / "pixels.bin").open("wb", buffering=0) as file:  # On a full disk, closing a buffer fails again.
        for batch in tqdm(loader, desc="images", disable=not progress):
            unreadable.update(batch.failed)
            read += len(batch.sizes) + len(batch.failed)
            estimate = (written + len(batch.pixels)) * len(records) // read  # the size of the whole file
            check_space(folder, estimate - written, "caching images")
            for position, height, width in batch.sizes:
                index[position] = written, height, width
                written += 3 * height * width
            left = batch.pixels.numpy().data
            try:
                while len(left):
                    left = left[file.write(left) :]
            except OSError as error:  # Another program filled the disk, or a quota was reached.
                raise DataError(f"{folder.parent}: cannot write the image cache ({error.strerror})") from error
        os.fsync(file.fileno())
    if not written:
        raise none_readable(records)
    np.save(folder / "index.npy", index)
    return unreadable
