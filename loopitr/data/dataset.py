"""Training examples from records, in DataLoader workers. All randomness is a function of (seed, epoch, index)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .hub_stream import HubStream
from .image_cache import ImageCache
from .images import UnreadableImage, decode_image
from .records import DataError, Record, caption_count, captions_of, identity_of, name_of, stable_hash
from .token_cache import TokenCache
from .transforms import seeded

Transform = Callable[[Any], Tensor]  # The argument is a PIL image, or with an ImageCache uint8 pixels [3, H, W].
Captions = Literal["one", "all"]
MAX_FAILURES = 50  # The number of unreadable images in a row that stops the run.


class CaptionDataset(Dataset[dict[str, Any]]):
    """Examples `{pixel_values [3, H, W] | image_tokens [N, D], caption, identity, skipped, name}` of records.

    A key is `(epoch, index)`, as from `EpochSampler`, or an index, for epoch 0. An unreadable image is replaced by the
    next readable record, so that batches keep their size on every rank; `skipped` has its name and the reason.

    Args:
        transform: makes `pixel_values`. Its randomness should come from torch's generator, which is seeded for each
            example.
        captions: "one" makes one example per image, with a caption drawn at each visit; "all" makes one per caption.
        tokens: caches to read image tokens from instead of decoding files, one per view of the images; each example
            draws one of the views.
        images: a cache to read decoded images from.
        shortest: passed to `decode_image`.

    Raises:
        DataError: there are no records.
        ValueError: arguments contradict each other, or a cache has another number of images.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        transform: Transform | None,
        captions: Captions = "one",
        seed: int = 0,
        tokens: Sequence[TokenCache] = (),
        images: ImageCache | None = None,
        shortest: int | None = None,
    ) -> None:
        _check_captions(captions)
        if not len(records):
            raise DataError("a dataset needs at least one record, got none")
        for what, cache in (*(("token", view) for view in tokens), ("image", images)):
            if cache is not None and len(cache) != len(records):
                raise ValueError(f"the {what} cache has {len(cache)} images, the records are {len(records)}")
        if tokens and images is not None:
            raise ValueError("either tokens or images can come from a cache, got both")
        if not tokens and transform is None:
            raise ValueError("a transform is needed where images are not read from a token cache, got None")
        self.records, self.transform, self.captions, self.seed = records, transform, captions, seed
        self.tokens, self.images, self.shortest = tokens, images, shortest
        if captions == "all":
            counts = np.array([caption_count(records, i) for i in range(len(records))])
            self._ends = counts.cumsum()  # [R]: the number of examples up to and with each record

    def __len__(self) -> int:
        return len(self.records) if self.captions == "one" else int(self._ends[-1])

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        seed = stable_hash(f"{self.seed}/{epoch}/{index}")
        start, position = self._locate(int(index))
        skipped: list[tuple[str, str]] = []
        for step in range(min(MAX_FAILURES, len(self.records))):
            current = (start + step) % len(self.records)
            captions = captions_of(self.records, current)
            if not captions:  # Sources leave such records out, but a user's own list may have some.
                skipped.append((name_of(self.records, current), "no captions"))
                continue
            try:
                image = self._image(current, seed)
            except UnreadableImage as error:
                skipped.append((error.name, f"unreadable image: {error.reason}"))
                continue
            if position is None or step:  # Also for a replacement, since it has other captions.
                position = random.Random(seed).randrange(len(captions))
            return {
                **image,
                "caption": captions[position],
                "identity": identity_of(self.records, current),
                "skipped": skipped,
                "name": name_of(self.records, current),
            }
        name, reason = skipped[0]
        raise DataError(f"{len(skipped)} images in a row are unreadable, the first is {name} ({reason})")

    def _locate(self, index: int) -> tuple[int, int | None]:
        """The record of an example, and the position of its caption; None: a caption is drawn."""
        if self.captions == "one":
            return index, None
        record = int(np.searchsorted(self._ends, index, side="right"))
        return record, index - (int(self._ends[record - 1]) if record else 0)

    def _image(self, index: int, seed: int) -> dict[str, Tensor]:
        if self.tokens:
            if index in self.tokens[0].unreadable:
                raise UnreadableImage(name_of(self.records, index), "no cached tokens")
            view = stable_hash(f"{seed}/view") % len(self.tokens)
            return {"image_tokens": self.tokens[view][index]}  # [N, D]
        assert self.transform is not None
        image: Any
        if self.images is not None:
            if index in self.images.unreadable:
                raise UnreadableImage(name_of(self.records, index), self.images.unreadable[index])
            image = self.images[index]
        else:
            record = self.records[index]
            image = decode_image(record.image, record.name, shortest=self.shortest)
        return {"pixel_values": _transformed(self.transform, image, seed)}


class StreamDataset(IterableDataset[dict[str, Any]]):
    """Examples of a stream, like those of `CaptionDataset`, split over DataLoader workers and ranks.

    An unreadable image is left out, and named in `skipped` of the next readable example. With captions="all" the
    captions of an image follow each other, so they are usually in one batch, as positives.

    Args:
        num_shards, index: the number of ranks, and this rank.
        shuffle_buffer: the number of rows in memory from which the next is drawn; 0 keeps the stream's order.
    """

    def __init__(
        self,
        stream: HubStream,
        *,
        transform: Transform,
        captions: Captions = "one",
        seed: int = 0,
        num_shards: int = 1,
        index: int = 0,
        shuffle_buffer: int = 0,
        shortest: int | None = None,
    ) -> None:
        _check_captions(captions)
        self.stream, self.transform, self.captions, self.seed = stream, transform, captions, seed
        self.num_shards, self.index, self.shuffle_buffer = num_shards, index, shuffle_buffer
        self.shortest = shortest
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # Persistent workers see changes of it.

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, which decides order, captions and transforms."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = int(self._epoch)
        worker = get_worker_info()
        workers, worker_index = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        stream = self.stream.shard(self.num_shards * workers, self.index * workers + worker_index)
        if self.shuffle_buffer:
            stream = stream.shuffle(self.seed, self.shuffle_buffer)
        stream.set_epoch(epoch)
        skipped: list[tuple[str, str]] = []
        failures: list[UnreadableImage] = []  # those in a row since the last readable image
        for record in stream.records(lambda reason, name: skipped.append((name, reason))):
            try:
                image = decode_image(record.image, record.name, shortest=self.shortest)
            except UnreadableImage as error:
                skipped.append((error.name, f"unreadable image: {error.reason}"))
                failures.append(error)
                if len(failures) >= MAX_FAILURES:
                    raise DataError(
                        f"{len(failures)} images in a row are unreadable, the first is {failures[0].name} "
                        f"({failures[0].reason})"
                    ) from error
                continue
            failures.clear()
            # Rows of a stream have no index, so the seed depends on the record's name and content.
            seed = stable_hash(f"{self.seed}/{epoch}/{record.name}/{record.identity}")
            chosen = record.captions if self.captions == "all" else [random.Random(seed).choice(record.captions)]
            for number, caption in enumerate(chosen):
                pixel_values = _transformed(self.transform, image, seed + number)
                yield {
                    "pixel_values": pixel_values,
                    "caption": caption,
                    "identity": record.identity,
                    "skipped": skipped,
                    "name": record.name,
                }
                skipped = []


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` in an order that depends only on (seed, epoch).

    Runs of `group` consecutive indices stay together, so that near misses that are neighbours in the data get into one
    batch; 1 shuffles everything.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool = True, group: int = 1) -> None:
        if group < 1:
            raise ValueError(f"group must be at least 1, got {group}")
        self.size, self.seed, self.shuffle, self.group = size, seed, shuffle, min(group, max(size, 1))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = torch.arange(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(stable_hash(f"{self.seed}/{epoch}"))
            blocks = torch.randperm(-(-self.size // self.group), generator=generator)
            order = (blocks[:, None] * self.group + torch.arange(self.group)).flatten()
        return ((epoch, index) for index in order.tolist() if index < self.size)  # The last block may be shorter.


def _check_captions(captions: str) -> None:
    if captions not in ("one", "all"):
        raise ValueError(f"captions must be 'one' or 'all', got {captions!r}")


def _transformed(transform: Transform, image: Any, seed: int) -> Tensor:
    with seeded(seed):
        return transform(image)  # [3, H, W]
