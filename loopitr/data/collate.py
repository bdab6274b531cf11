"""Turns examples into one padded batch."""

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
    """The inputs of a training step, and what was skipped or cut to make them.

    Attributes:
        inputs: the arguments of `LoopObjective.forward`: `pixel_values [B, 3, H, W]` or `image_tokens [B, N, D]`;
            `input_ids` and `attention_mask [B, L]`; from a cache `text_tokens [B, L, D]` and `text_pooled [B, D']`;
            `identities [B]`; `caption_ids [B]`, equal for equal captions.
        skipped: the name of every example that could not be read, with the reason.
        truncated: the number of captions that were cut to the collator's `max_length`.
        names: `[B]`, the names of the images.
    """

    inputs: dict[str, Tensor]
    skipped: tuple[tuple[str, str], ...]
    truncated: int
    names: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """A copy of the batch in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        return replace(self, inputs={name: value.pin_memory() for name, value in self.inputs.items()})


class Collator:
    """Stacks images or image tokens, and tokenizes captions, padded to the longest of the batch.

    With `texts`, it adds the cached output of the text backbone.

    Raises:
        ValueError: the tokenizer has no padding token, or `max_length` is below 1.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, texts: TextTokenCache | None = None
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer must have a padding token, got none in {type(tokenizer).__name__}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.tokenizer, self.max_length, self.texts = tokenizer, max_length, texts
        # Without this, each forked worker would warn, and would itself turn the tokenizer's threads off.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        captions = [example["caption"] for example in examples]
        text = self.tokenizer(
            captions,
            padding=True,
            padding_side="right",  # Pooling takes the first token, and evaluation pads on the right.
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,  # SigLIP's tokenizers return none by default.
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
    """The number of captions that were longer than `max_length` tokens; `lengths` are those after truncation."""
    full = [caption for caption, length in zip(captions, lengths) if length >= max_length]
    if not full:
        return 0
    # Only captions that fill the limit can have been longer; only those are tokenized again, without a limit.
    whole = tokenizer(full, verbose=False)["input_ids"]
    return sum(len(ids) > max_length for ids in whole)


def caption_id(caption: str) -> int:
    """Signed 64-bit id, equal for captions that differ only in case and spaces."""
    return stable_hash(" ".join(caption.lower().split()))
