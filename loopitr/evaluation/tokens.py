"""Image and caption tokens of a gallery as streams: what fits into memory is kept, the rest computed again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from loopitr.data import DataError, Record, TokenCache, UnreadableImage, decode_image, name_of
from loopitr.model import DualEncoder, LoopITRModel
from loopitr.processing import LoopITRProcessor
from loopitr.states import TextState

from .gallery import Transform


@dataclass(frozen=True)
class _Read:
    """Decoded images, or tokens from a cache, of `positions`; `failed` holds (position, reason)."""

    positions: list[int]
    inputs: Tensor | None
    failed: list[tuple[int, str]]


class _Images(Dataset[tuple[int, Tensor | str]]):
    def __init__(self, records: Sequence[Record], transform: Transform) -> None:
        self.records, self.transform = records, transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> tuple[int, Tensor | str]:
        record = self.records[position]
        try:
            return position, self.transform(decode_image(record.image, record.name))
        except UnreadableImage as error:
            return position, error.reason


def _stack(items: list[tuple[int, Any]]) -> _Read:
    good = [(position, x) for position, x in items if isinstance(x, Tensor)]
    failed = [(position, x) for position, x in items if not isinstance(x, Tensor)]
    return _Read([p for p, _ in good], torch.stack([x for _, x in good]) if good else None, failed)


class ImageTokens:
    """Tokens `[b, N, D]` of images in blocks, from a cache or from the backbone, decoded in DataLoader workers.

    `embed` runs over all images once; tokens that fit into `memory` bytes are kept for `blocks`, else they are
    computed again there.
    """

    def __init__(
        self,
        model: DualEncoder,
        records: Sequence[Record],
        transform: Transform,
        *,
        cache: TokenCache | None,
        batch_size: int,
        num_workers: int,
    ) -> None:
        if cache is not None and len(cache) < len(records):
            raise ValueError(f"the token cache has {len(cache)} images, the records are {len(records)}")
        self.model, self.records, self.transform, self.cache = model, records, transform, cache
        self.batch_size, self.num_workers = batch_size, num_workers
        self.kept: dict[int, Tensor] = {}

    def embed(self, positions: list[int], *, memory: int) -> Iterator[tuple[list[int], Tensor, list[tuple[int, str]]]]:
        """Batches of (positions, embeds `[b, E]`, failed): the first pass."""
        fits = None
        for read in self._read(list(_chunks(positions, self.batch_size))):
            if read.inputs is None:
                yield [], torch.empty(0), read.failed
                continue
            tokens = self._encode(read.inputs)
            if fits is None:
                fits = tokens[0].numel() * tokens.element_size() * len(positions) <= memory
            if fits:
                self.kept.update(zip(read.positions, tokens.unbind()))
            yield read.positions, self.model.embed_image_tokens(tokens).float(), read.failed

    def blocks(self, positions: list[int], size: int) -> Iterator[Tensor]:
        """Tokens of at most `size` images at a time, in order: the second pass.

        Raises:
            DataError: an image that was readable in the first pass no longer is.
        """
        blocks = list(_chunks(positions, size))
        if self.kept:
            yield from (torch.stack([self.kept[position] for position in block]) for block in blocks)
            return
        parts = [list(_chunks(block, self.batch_size)) for block in blocks]
        reads = self._read([part for block in parts for part in block])
        for block in parts:
            tokens = []
            for _ in block:
                read = next(reads)
                if read.failed or read.inputs is None:
                    position, reason = read.failed[0]
                    raise DataError(f"{name_of(self.records, position)}: unreadable while being evaluated ({reason})")
                tokens.append(self._encode(read.inputs))
            yield torch.cat(tokens)  # [b, N, D]

    def _encode(self, inputs: Tensor) -> Tensor:
        parameter = next(self.model.parameters())
        inputs = inputs.to(parameter.device, parameter.dtype)
        return inputs if self.cache is not None else self.model.vision(inputs)  # [b, N, D]

    def _read(self, batches: list[list[int]]) -> Iterator[_Read]:
        if self.cache is not None:
            missing, cache = self.cache.unreadable, self.cache
            for batch in batches:  # float(): autocast on the CPU cannot stack float16
                yield _stack([(p, "no cached tokens" if p in missing else cache[p].float()) for p in batch])
            return
        yield from DataLoader(
            _Images(self.records, self.transform),
            batch_sampler=batches,
            num_workers=min(self.num_workers, len(batches)),
            collate_fn=_stack,
            generator=torch.Generator(),  # validating must not move the generator that dropout uses
        )


class TextTokens:
    """All captions' embeds `[T, E]`, and the tokens of any of them on demand.

    Tokens that fit into `memory` bytes are kept, without padding; otherwise `state` runs the backbone again.
    """

    def __init__(
        self, model: LoopITRModel | DualEncoder, processor: LoopITRProcessor, captions: list[str], *, batch_size: int
    ) -> None:
        # forked DataLoader workers would otherwise warn, each
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        dual = model if isinstance(model, DualEncoder) else model.dual_encoder()
        tokenizer = processor.tokenizer
        limit = min(tokenizer.model_max_length, dual.text.max_length)
        ids = tokenizer(captions, truncation=True, max_length=limit, return_token_type_ids=False)["input_ids"]
        full = [caption for caption, row in zip(captions, ids) if len(row) >= limit]
        whole = tokenizer(full, verbose=False)["input_ids"] if full else []
        self.truncated = sum(len(row) > limit for row in whole)
        self.model, self.batch_size = model, batch_size
        self.ids = [torch.tensor(row) for row in ids]
        self.lengths = torch.tensor([len(row) for row in ids])
        self.padding: int = tokenizer.pad_token_id or 0
        self.device = next(model.parameters()).device
        self.embeds = torch.empty(0)
        self.kept: Tensor | None = None  # [sum(lengths), D]
        self.starts = torch.cumsum(self.lengths, 0) - self.lengths

    def embed(self, *, memory: int) -> Iterator[int]:
        """Fill `embeds`; yields how many captions each batch held."""
        embeds: list[Tensor] = []
        order = torch.argsort(self.lengths, stable=True)  # little padding
        for batch in order.split(self.batch_size):
            input_ids, mask = self._padded(batch)
            if isinstance(self.model, DualEncoder):
                embeds.append(self.model.get_text_features(input_ids, mask.long()))
            else:
                state = self.model.encode_texts(input_ids, mask.long())
                embeds.append(state.embeds)
                self._keep(batch, state, memory)
            yield len(batch)
        self.embeds = torch.cat(embeds).float()[torch.argsort(order).to(self.device)]  # [T, E]

    def state(self, indices: Tensor) -> TextState:
        """The captions at `indices [n]` (on the CPU) as one padded state."""
        longest = int(self.lengths[indices].max())
        mask = (torch.arange(longest) < self.lengths[indices, None]).to(self.device)  # [n, L]
        if self.kept is not None:
            last = self.starts[indices] + self.lengths[indices] - 1
            rows = torch.minimum(self.starts[indices, None] + torch.arange(longest), last[:, None])  # [n, L]
            return TextState(self.embeds[indices.to(self.device)], self.kept[rows.to(self.device)], mask)
        assert isinstance(self.model, LoopITRModel)
        tokens: list[Tensor] = []
        for batch in indices.split(self.batch_size):
            input_ids, own = self._padded(batch)
            part = self.model.encode_texts(input_ids, own.long()).tokens  # [b, l, D]
            tokens.append(torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])))
        return TextState(self.embeds[indices.to(self.device)], torch.cat(tokens), mask)

    def _padded(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = [self.ids[index] for index in indices.tolist()]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)  # [n, L]
        mask = torch.arange(input_ids.shape[1]) < self.lengths[indices, None]  # [n, L]
        return input_ids.to(self.device), mask.to(self.device)

    def _keep(self, batch: Tensor, state: TextState, memory: int) -> None:
        if self.kept is None:
            total = int(self.lengths.sum())
            width, size = state.tokens.shape[-1], state.tokens.element_size()
            if total * width * size > memory:
                return
            self.kept = state.tokens.new_empty(total, width)
        offsets = torch.arange(state.tokens.shape[1])
        rows = (self.starts[batch, None] + offsets).to(self.device)  # [b, L]
        self.kept[rows[state.mask]] = state.tokens[state.mask]


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
