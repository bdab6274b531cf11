"""Makes training examples of records, in DataLoader workers. All randomness is a function of (seed, epoch, index)."""

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

Transform = Callable[[Any], Tensor]  # Its argument is a PIL image, or with an ImageCache uint8 pixels [3, H, W].
Captions = Literal["one", "all"]
MAX_FAILURES = 50  # After so many unreadable images in a row it is the data that is broken, not an image.


class CaptionDataset(Dataset[dict[str, Any]]):
    """Examples `{pixel_values [3, H, W] | image_tokens [N, D], caption, identity, skipped, name}` of map-style records.

    A key is `(epoch, index)`, as `EpochSampler` gives it, or a plain index of epoch 0. With captions="one" there is one
    example per image and a caption is drawn per visit; with "all" one per caption. An unreadable image is replaced by
    the next readable record, so that batches keep their size on every rank; `skipped` names it with the reason.
    `transform` should draw from torch's generator only: this one is seeded per example. `shortest` is passed on to
    `decode_image`; with `images` nothing is decoded. `tokens` are caches of the same images, one per view of them:
    each example draws its view.
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
            if not captions:  # The sources leave such records out, but a list of one's own may hold some.
                skipped.append((name_of(self.records, current), "no captions"))
                continue
            try:
                image = self._image(current, seed)
            except UnreadableImage as error:
                skipped.append((error.name, f"unreadable image: {error.reason}"))
                continue
            if position is None or step:  # A replacement has other captions, of which one is drawn.
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
        """The record of an example, and which of its captions, or None where one is to be drawn."""
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
    """The same examples from a stream, split over DataLoader workers and, by `num_shards` and `index`, over ranks.

    Unreadable images are left out and named in `skipped` of the next good example. With captions="all" the captions
    of an image follow each other, so they meet in a batch (as positives). `shuffle_buffer=0` keeps the stream's order.
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
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # Persistent workers see it change.

    def set_epoch(self, epoch: int) -> None:
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
        failures: list[UnreadableImage] = []  # These came in a row.
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
            # Rows have no number here, so that the record's own name and content stand for its index.
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
    """Yields `(epoch, index)`, in an order that depends on (seed, epoch) alone.

    Runs of `group` consecutive indices stay together, so that near misses that lie beside each other in the data meet
    in a batch; 1 shuffles everything.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool = True, group: int = 1) -> None:
        if group < 1:
            raise ValueError(f"group must be at least 1, got {group}")
        self.size, self.seed, self.shuffle, self.group = size, seed, shuffle, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = torch.arange(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(stable_hash(f"{self.seed}/{epoch}"))
            blocks = torch.randperm(-(-self.size // self.group), generator=generator)
            order = (blocks[:, None] * self.group + torch.arange(self.group)).flatten()  # The last block may be short.
        return ((epoch, index) for index in order.tolist() if index < self.size)


def _check_captions(captions: str) -> None:
    if captions not in ("one", "all"):
        raise ValueError(f"captions must be 'one' or 'all', got {captions!r}")


def _transformed(transform: Transform, image: Any, seed: int) -> Tensor:
    with seeded(seed):
        return transform(image)  # [3, H, W]
