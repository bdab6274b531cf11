"""Examples -> one padded batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .records import stable_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Collator:
    """Stacks images (or image tokens) and tokenizes captions, padded to the longest of the batch.

    The batch: `pixel_values [B, 3, H, W]` or `image_tokens [B, N, D]`; `input_ids`, `attention_mask [B, L]`;
    `identities [B]`; `caption_ids [B]`, equal for equal captions; `skipped`, the (name, reason) of its examples;
    `truncated`, how many captions were longer than `max_length`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer must have a padding token, got none in {type(tokenizer).__name__}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.tokenizer, self.max_length = tokenizer, max_length
        # forked workers would otherwise warn, each, and turn the tokenizer's threads off themselves
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        captions = [example["caption"] for example in examples]
        text = self.tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,  # SigLIP's tokenizers give none by themselves
            return_tensors="pt",
        )
        images = "image_tokens" if "image_tokens" in examples[0] else "pixel_values"
        return {
            images: torch.stack([example[images] for example in examples]),  # [B, 3, H, W] or [B, N, D]
            "input_ids": text["input_ids"],  # [B, L]
            "attention_mask": text["attention_mask"],  # [B, L]
            "identities": torch.tensor([example["identity"] for example in examples], dtype=torch.int64),  # [B]
            "caption_ids": torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64),  # [B]
            "skipped": [item for example in examples for item in example["skipped"]],
            "truncated": self._count_truncated(captions, text["attention_mask"].sum(dim=1).tolist()),
        }

    def _count_truncated(self, captions: Sequence[str], lengths: Sequence[int]) -> int:
        full = [caption for caption, length in zip(captions, lengths) if length >= self.max_length]
        if not full:
            return 0
        # only a caption that fills the limit can have lost words; tokenizing it whole tells
        whole = self.tokenizer(full, verbose=False)["input_ids"]
        return sum(len(ids) > self.max_length for ids in whole)


def caption_id(caption: str) -> int:
    """Signed 64-bit id, equal for captions that differ only in case and spaces."""
    return stable_hash(" ".join(caption.lower().split()))
