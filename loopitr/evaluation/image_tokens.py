"""The image tokens of a gallery, in blocks: stored when first computed, or computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopitr.data import DataError, DecodedImages, Record, TokenCache, UnreadableImage, name_of
from loopitr.models.folding import folded
from loopitr.models.image_backbone import VisionBackbone
from loopitr.models.loop_model import DualEncoder
from loopitr.models.packing import send

from .gallery import Transform
from .side_by_side import Shares, side_by_side
from .storage import TokenStorage, TokenStore


@dataclass(frozen=True)
class _Read:
    """Decoded images, or tokens from a cache, of `positions`; `failed` has (position, reason) of unreadable images."""

    positions: list[int]
    inputs: Tensor | None
    failed: list[tuple[int, str]]


def _stack(items: list[tuple[int, Any]]) -> _Read:
    good = [(position, x) for position, x in items if isinstance(x, Tensor)]
    failed = [(position, x) for position, x in items if not isinstance(x, Tensor)]
    return _Read([p for p, _ in good], torch.stack([x for _, x in good]) if good else None, failed)


@dataclass(frozen=True)
class _Encoded:
    """`tokens [b, N, D]` and `embeds [b, E]` of the images at `positions`, each if it was asked for."""

    positions: list[int]
    failed: list[tuple[int, str]]
    tokens: Tensor | None = None
    embeds: Tensor | None = None


@dataclass(frozen=True)
class EncodedImages:
    """`embeds [n, E]` (CPU, float32) of the images at `positions`; `failed` has (position, reason) of the others."""

    positions: list[int]
    embeds: Tensor
    failed: list[tuple[int, str]]


class ImageTokens:
    """Reads images in DataLoader workers, or tokens from a cache, and gives tokens `[b, N, D]` in blocks."""

    def __init__(
        self,
        model: DualEncoder,
        records: Sequence[Record],
        transform: Transform,
        *,
        cache: TokenCache | None,
        batch_size: int,
        num_workers: int,
        all_readable: bool = False,
        open_in_threads: bool = False,
    ) -> None:
        """
        Args:
            batch_size: the number of images that are encoded at a time.
            all_readable: raise an `UnreadableImage` for the first unreadable image, instead of reporting it.
            open_in_threads: several threads may read records at once.

        Raises:
            ValueError: the cache has fewer images than there are records.
        """
        if cache is not None and len(cache) < len(records):
            raise ValueError(f"the token cache has {len(cache)} images, the records are {len(records)}")
        self.model, self.records, self.transform, self.cache = model, records, transform, cache
        self.batch_size, self.num_workers, self.all_readable = batch_size, num_workers, all_readable
        self.open_in_threads = open_in_threads
        self.parameter = next(model.parameters())
        self.store: TokenStore | None = None
        self.rows: dict[int, int] = {}  # position -> row of the store

    def encode(self, positions: list[int], *, storage: TokenStorage | None, progress: bool = False) -> EncodedImages:
        """The first pass: encode images, and store their tokens for `blocks`.

        Args:
            storage: where to store tokens; None: `blocks` will not be called.
        """
        if storage is not None:
            vision, device = self.model.vision, self.parameter.device
            shape = (len(positions), vision.num_tokens, vision.width)
            self.store = storage.open(*shape, device=device, name=self._name, may_map=self.cache is None)
            self.rows = {position: row for row, position in enumerate(positions)}
        encoded, failed = list[int](), list[tuple[int, str]]()
        embeds = [torch.empty(0, self.model.config.embed_dim)]
        with tqdm(total=len(positions), desc="encode images", unit="image", disable=not progress, leave=False) as bar:
            for block in self._encoded([positions], tokens=self.store is not None, embeds=True):
                failed += block.failed
                if block.embeds is not None:
                    if self.store is not None and block.tokens is not None:
                        self.store.write(self._rows(block.positions), block.tokens)
                    encoded += block.positions
                    embeds.append(block.embeds)
                bar.update(len(block.positions) + len(block.failed))
        return EncodedImages(encoded, torch.cat(embeds), failed)

    def blocks(self, positions: list[int], size: int) -> Iterator[Tensor]:
        """The second pass: the tokens of at most `size` images at a time, in order.

        Raises:
            DataError: an image that was readable in the first pass is not any more.
        """
        blocks = list(_chunks(positions, size))
        if self.store is not None:
            yield from _stored(self.store, [self._rows(block) for block in blocks], self.parameter.device)
            return
        stream = self._encoded(blocks, tokens=True)
        for block in blocks:
            tokens: list[Tensor] = []
            while sum(map(len, tokens)) < len(block):
                encoded = next(stream)
                if encoded.failed or encoded.tokens is None:
                    position, reason = encoded.failed[0]
                    raise DataError(f"{name_of(self.records, position)}: unreadable while being evaluated ({reason})")
                tokens.append(encoded.tokens)
            yield torch.cat(tokens)  # [b, N, D]

    def _encoded(self, blocks: list[list[int]], *, tokens: bool, embeds: bool = False) -> Iterator[_Encoded]:
        """The images of the blocks in order, a few at a time, none of which are of two blocks."""
        count = sum(map(len, blocks))
        shares = Shares.of(count, self.batch_size, self.model.vision.image_size, self.parameter.device)
        vision = self.model.vision if self.cache is not None else self._vision

        def encode(read: _Read) -> _Encoded:
            if read.inputs is None:
                return _Encoded(read.positions, read.failed)
            (inputs,) = send([read.inputs], self.parameter.device)
            inputs = inputs.to(self.parameter.dtype)
            found = inputs if self.cache is not None else vision(inputs)  # [b, N, D]
            embedded = self.model.embed_image_tokens(found).float().cpu() if embeds else None  # [b, E]
            return _Encoded(read.positions, read.failed, found if tokens else None, embedded)

        if self.cache is not None:
            batches = [batch for block in blocks for batch in _chunks(block, self.batch_size)]
            yield from map(encode, self._cached(batches))
            return
        stream = side_by_side(
            DecodedImages(self.records, self.transform),
            [batch for block in blocks for batch in _chunks(block, shares.size)],
            _stack,
            encode,
            shares=shares,
            num_workers=self.num_workers,
            open_in_threads=self.open_in_threads,
        )
        for encoded in stream:
            if encoded.failed and self.all_readable:
                position, reason = encoded.failed[0]
                raise UnreadableImage(name_of(self.records, position), reason)
            yield encoded

    @cached_property
    def _vision(self) -> VisionBackbone:
        # By the number of all records, so that every rank of an evaluation decides alike.
        return folded(self.model.vision, len(self.records))

    def _cached(self, batches: list[list[int]]) -> Iterator[_Read]:
        assert self.cache is not None
        missing, cache = self.cache.unreadable, self.cache
        for batch in batches:  # float(): autocast on the CPU cannot stack float16
            yield _stack([(p, "no cached tokens" if p in missing else cache[p].float()) for p in batch])

    def _rows(self, positions: list[int]) -> Tensor:
        return torch.tensor([self.rows[position] for position in positions])

    def _name(self, row: int) -> str:
        return name_of(self.records, list(self.rows)[row])


def _stored(store: TokenStore, blocks: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The stored tokens of each block; from disk, the next block is read while the caller works on the current one."""
    if not store.on_disk:
        yield from (store.read(rows) for rows in blocks)
        return

    def read(rows: Tensor) -> Tensor:
        tokens = store.read(rows)
        return tokens.pin_memory() if device.type == "cuda" else tokens  # Pinned memory is copied while the GPU works.

    with ThreadPoolExecutor(1) as reader:
        pending = [reader.submit(read, rows) for rows in blocks[:1]]
        for number in range(len(blocks)):
            tokens = pending.pop().result()
            pending += [reader.submit(read, rows) for rows in blocks[number + 1 : number + 2]]
            yield tokens.to(device, non_blocking=True)


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
