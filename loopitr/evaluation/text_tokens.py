"""The captions of a gallery: their embeds, and their tokens, stored when first computed or computed again."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopitr.data import TextTokenCache, count_truncated
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.outputs import TextFeatures, TextState
from loopitr.models.packing import send
from loopitr.models.processing import LoopITRProcessor

from .storage import TokenStorage, TokenStore


class TextTokens:
    """The embeds of captions, and the tokens of any of them.

    Tokens are stored without padding. Before `state` is called, the caller sets `embeds [T, E]` of all captions and
    calls `keep` with the captions it needs.

    Args:
        storage: where to store tokens; None: `state` will not be called. If it does not store them, `state` runs the
            backbone again.
        cache: the backbone's output for all captions, used instead of running it.
    """

    def __init__(
        self,
        model: LoopITRModel | DualEncoder,
        processor: LoopITRProcessor,
        captions: list[str],
        *,
        batch_size: int,
        storage: TokenStorage | None,
        cache: TextTokenCache | None = None,
    ) -> None:
        # Without this, every forked DataLoader worker would print a warning.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.dual = model if isinstance(model, DualEncoder) else model.dual_encoder()
        tokenizer = processor.tokenizer
        self.limit = limit = min(tokenizer.model_max_length, self.dual.text.max_length)
        ids = tokenizer(captions, truncation=True, max_length=limit, return_token_type_ids=False)["input_ids"]
        self.truncated = count_truncated(tokenizer, captions, [len(row) for row in ids], limit)
        self.model, self.batch_size, self.captions = model, batch_size, captions
        self.ids = [torch.tensor(row) for row in ids]
        self.lengths = torch.tensor([len(row) for row in ids])
        self.ends = torch.cumsum(self.lengths, 0)  # [T], the end of each caption's rows in the store
        self.padding: int = tokenizer.pad_token_id or 0
        self.parameter = next(model.parameters())
        self.embeds = torch.empty(0)
        self.storage, self.cache = storage, cache
        self.store: TokenStore | None = None  # [sum(lengths), D]
        self.stored = torch.zeros(len(captions), dtype=torch.bool)

    def encode(self, indices: Tensor, *, progress: bool = False) -> Tensor:
        """Embeds `[n, E]` (CPU, float32) of the captions at `indices [n]`; their tokens are stored."""
        if self.storage is not None and self.store is None:
            count, width = int(self.lengths.sum()), self.dual.text.width
            self.store = self.storage.open(count, width, device=self.parameter.device, name=self._name)
        # Batches of similar lengths need little padding.
        order = torch.argsort(self.lengths[indices], stable=True)
        embeds = torch.empty(len(indices), self.dual.config.embed_dim)
        with tqdm(total=len(indices), desc="encode captions", unit="caption", disable=not progress, leave=False) as bar:
            for batch in order.split(self.batch_size) if len(order) else ():  # Splitting none gives an empty batch.
                if isinstance(self.model, DualEncoder):
                    embeds[batch] = self._embed(indices[batch]).float().cpu()
                else:
                    state = self._encode(indices[batch], self.model)
                    embeds[batch] = state.embeds.float().cpu()
                    self._store(indices[batch], state)
                bar.update(len(batch))
        return embeds

    def keep(self, indices: Tensor, *, progress: bool = False) -> None:
        """Store the tokens of the captions at `indices [n]` that are not stored yet, if tokens are stored at all."""
        missing = indices[~self.stored[indices]]
        if self.store is not None and len(missing):
            self.encode(missing, progress=progress)

    def state(self, indices: Tensor) -> TextState:
        """The captions at `indices [n]` (on the CPU) as one padded state.

        Raises:
            RuntimeError: tokens are stored, but not those of one of these captions.
        """
        lengths = self.lengths[indices, None]
        offset = torch.arange(int(lengths.max()))
        mask = offset < lengths  # [n, L]
        embeds = self.embeds.index_select(0, *send([indices], self.embeds.device))
        if self.store is not None:
            missing = indices[~self.stored[indices]]
            if len(missing):
                raise RuntimeError(f"the tokens of caption {self.captions[int(missing[0])]!r} are not kept yet")
            rows = self.ends[indices, None] - lengths + torch.minimum(offset, lengths - 1)  # [n, L]
            tokens = self.store.read(rows.flatten())
            if tokens.device.type == "cpu":
                (tokens,) = send([tokens], self.parameter.device)
            return TextState(embeds, tokens.to(self.parameter.dtype).unflatten(0, rows.shape), mask)
        assert isinstance(self.model, LoopITRModel)
        parts: list[Tensor] = []
        for batch in indices.split(self.batch_size):
            part = self._encode(batch, self.model).tokens  # [b, l, D]
            parts.append(torch.nn.functional.pad(part, (0, 0, 0, len(offset) - part.shape[1])))
        return TextState(embeds, torch.cat(parts), mask)

    def _embed(self, indices: Tensor) -> Tensor:
        if self.cache is None:
            input_ids, mask = self._padded(indices)
            return self.dual.get_text_features(input_ids, mask.long())
        return self.dual.embed_pooled_texts(self._cached(indices).pooled.to(self.parameter.dtype))

    def _encode(self, indices: Tensor, model: LoopITRModel) -> TextState:
        input_ids, mask = self._padded(indices)
        if self.cache is None:
            return model.encode_texts(input_ids, mask.long())
        return model.text_state(self._cached(indices), mask)

    def _cached(self, indices: Tensor) -> TextFeatures:
        assert self.cache is not None
        cached = self.cache.read([self.captions[i] for i in indices.tolist()], self.lengths[indices].tolist())
        pooled, tokens = send([cached.pooled, cached.tokens], self.parameter.device)
        return TextFeatures(pooled=pooled, tokens=tokens)

    def _padded(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = [self.ids[index] for index in indices.tolist()]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)  # [n, L]
        mask = torch.arange(input_ids.shape[1]) < self.lengths[indices, None]  # [n, L]
        input_ids, mask = send([input_ids, mask], self.parameter.device)
        return input_ids, mask

    def _store(self, indices: Tensor, state: TextState) -> None:
        if self.store is None:
            return
        lengths = self.lengths[indices, None]
        offset = torch.arange(state.tokens.shape[1])
        rows = self.ends[indices, None] - lengths + offset  # [b, L]
        self.store.write(rows[offset < lengths], state.tokens[state.mask])
        self.stored[indices] = True

    def _name(self, row: int) -> str:
        return f"caption {self.captions[int(torch.searchsorted(self.ends, row, right=True))]!r}"
