"""Image tokens of a gallery as a stream of blocks: computed once and kept, or computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopitr.data import DataError, DecodedImages, Record, TokenCache, UnreadableImage, name_of
from loopitr.models.folding import folded
from loopitr.models.loop_model import DualEncoder
from loopitr.models.packing import send

from .gallery import Transform
from .side_by_side import Shares, side_by_side
from .storage import TokenStorage, TokenStore


@dataclass(frozen=True)
class _Read:
    """Decoded images, or tokens from a cache, of `positions`; `failed` holds (position, reason)."""

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
    """`embeds [n, E]` (CPU, float32) of the images at `positions`; `failed` holds (position, reason)."""

    positions: list[int]
    embeds: Tensor
    failed: list[tuple[int, str]]


class ImageTokens:
    """Tokens `[b, N, D]` of images in blocks, from a cache or from the backbone, decoded in DataLoader workers."""

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
            batch_size: images that are encoded at a time.
            all_readable: an unreadable image is an `UnreadableImage` error at once, instead of one that failed.
            open_in_threads: whether several threads may read records at once.
        """
        if cache is not None and len(cache) < len(records):
            raise ValueError(f"the token cache has {len(cache)} images, the records are {len(records)}")
        self.model, self.records, self.transform, self.cache = model, records, transform, cache
        self.batch_size, self.num_workers, self.all_readable = batch_size, num_workers, all_readable
        self.open_in_threads = open_in_threads
        self.parameter = next(model.parameters())
        self.store: TokenStore | None = None
        self.rows: dict[int, int] = {}  # of the store, by position

    def encode(self, positions: list[int], *, storage: TokenStorage | None, progress: bool = False) -> EncodedImages:
        """The first pass; tokens that `storage` takes are kept for `blocks`, None: they will not be asked for."""
        if storage is not None:
            vision, device = self.model.vision, self.parameter.device
            shape = (len(positions), vision.num_tokens, vision.width)
            self.store = storage.open(*shape, device=device, name=self._name, may_map=self.cache is None)
            self.rows = {position: row for row, position in enumerate(positions)}
        done, failed = list[int](), list[tuple[int, str]]()
        embeds = [torch.empty(0, self.model.config.embed_dim)]
        with tqdm(total=len(positions), desc="encode images", unit="image", disable=not progress, leave=False) as bar:
            for encoded in self._encoded([positions], tokens=self.store is not None, embeds=True):
                failed += encoded.failed
                if encoded.embeds is not None:
                    if self.store is not None and encoded.tokens is not None:
                        self.store.write(self._rows(encoded.positions), encoded.tokens)
                    done += encoded.positions
                    embeds.append(encoded.embeds)
                bar.update(len(encoded.positions) + len(encoded.failed))
        return EncodedImages(done, torch.cat(embeds), failed)

    def blocks(self, positions: list[int], size: int) -> Iterator[Tensor]:
        """Tokens of at most `size` images at a time, in order: the second pass.

        Raises:
            DataError: an image that was readable in the first pass no longer is.
        """
        blocks = list(_chunks(positions, size))
        if self.store is not None:
            yield from _kept(self.store, [self._rows(block) for block in blocks], self.parameter.device)
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
        vision = self.model.vision if self.cache is not None else folded(self.model.vision, count)

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

    def _cached(self, batches: list[list[int]]) -> Iterator[_Read]:
        assert self.cache is not None
        missing, cache = self.cache.unreadable, self.cache
        for batch in batches:  # float(): autocast on the CPU cannot stack float16
            yield _stack([(p, "no cached tokens" if p in missing else cache[p].float()) for p in batch])

    def _rows(self, positions: list[int]) -> Tensor:
        return torch.tensor([self.rows[position] for position in positions])

    def _name(self, row: int) -> str:
        return name_of(self.records, list(self.rows)[row])


def _kept(store: TokenStore, blocks: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """`store.read` of each block; of a file, the next block is read while the caller works on this one."""
    if not store.on_disk:
        yield from (store.read(rows) for rows in blocks)
        return

    def read(rows: Tensor) -> Tensor:
        tokens = store.read(rows)
        return tokens.pin_memory() if device.type == "cuda" else tokens  # to be copied beside the GPU's work

    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read, rows) for rows in blocks[:1]]
        for number in range(len(blocks)):
            tokens = coming.pop().result()
            coming += [reader.submit(read, rows) for rows in blocks[number + 1 : number + 2]]
            yield tokens.to(device, non_blocking=True)


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
