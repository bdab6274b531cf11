"""Makes one padded batch of examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .records import stable_hash
from .text_cache import TextTokenCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What `Collator` makes of examples: the inputs of a training step, and what the data lost on the way to it.

    `inputs` is exactly what `LoopObjective.forward` takes: `pixel_values [B, 3, H, W]` or `image_tokens [B, N, D]`;
    `input_ids` and `attention_mask [B, L]`; from a cache `text_tokens [B, L, D]` and `text_pooled [B, D']`;
    `identities [B]`; `caption_ids [B]`, equal for equal captions.
    `skipped` holds the name and the reason of every example that could not be read. `truncated` is the number of
    captions that were longer than the collator's `max_length`. `names [B]` says which images these are.
    """

    inputs: dict[str, Tensor]
    skipped: tuple[tuple[str, str], ...]
    truncated: int
    names: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        return replace(self, inputs={name: value.pin_memory() for name, value in self.inputs.items()})


class Collator:
    """Stacks images (or image tokens) and tokenizes captions, padded to the longest of the batch; with a cache, what
    the text backbone makes of them comes along."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, texts: TextTokenCache | None = None
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer must have a padding token, got none in {type(tokenizer).__name__}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.tokenizer, self.max_length, self.texts = tokenizer, max_length, texts
        # Otherwise each forked worker would warn, and turn the tokenizer's threads off itself.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        captions = [example["caption"] for example in examples]
        text = self.tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,  # SigLIP's tokenizers give none by default.
            return_tensors="pt",
        )
        images = "image_tokens" if "image_tokens" in examples[0] else "pixel_values"
        inputs = {
            images: torch.stack([example[images] for example in examples]),  # [B, 3, H, W] or [B, N, D]
            "input_ids": text["input_ids"],  # [B, L]
            "attention_mask": text["attention_mask"],  # [B, L]
            "identities": torch.tensor([example["identity"] for example in examples], dtype=torch.int64),  # [B]
            "caption_ids": torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64),  # [B]
        }
        lengths = text["attention_mask"].sum(dim=1).tolist()
        if self.texts is not None:
            cached = self.texts.read(captions, lengths)
            inputs |= {"text_tokens": cached.tokens, "text_pooled": cached.pooled}
        return Batch(
            inputs=inputs,
            skipped=tuple(item for example in examples for item in example["skipped"]),
            truncated=count_truncated(self.tokenizer, captions, lengths, self.max_length),
            names=tuple(example.get("name", "") for example in examples),
        )


def count_truncated(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], lengths: Sequence[int], max_length: int
) -> int:
    """The number of captions that lost words when they were cut to `max_length` tokens, `lengths` after the cut."""
    full = [caption for caption, length in zip(captions, lengths) if length >= max_length]
    if not full:
        return 0
    # Only a caption that fills the limit can have lost words, so only those are tokenized a second time, uncut.
    whole = tokenizer(full, verbose=False)["input_ids"]
    return sum(len(ids) > max_length for ids in whole)


def caption_id(caption: str) -> int:
    """Signed 64-bit id, equal for captions that differ only in case and spaces."""
    return stable_hash(" ".join(caption.lower().split()))
