"""Which tokens masked language modelling hides (BERT, arXiv 1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopitr.objective.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TokenMasking:
    """`(input_ids, attention_mask) -> (changed ids, labels)`: each real, non-special token is to be predicted with
    `probability`; of these tokens 80% become the mask token, 10% a random one, 10% stay."""

    mask_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    probability: float = 0.15

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        special = torch.isin(input_ids, torch.tensor(self.special_ids, device=input_ids.device))
        draw = torch.rand(input_ids.shape, device=input_ids.device)  # [B, L]
        chosen = (draw < self.probability) & ~special & attention_mask.bool()
        labels = input_ids.where(chosen, IGNORE_INDEX)
        kind = draw / self.probability  # uniform in 0..1 among the chosen
        words = torch.randint_like(input_ids, self.vocab_size)
        changed = torch.where(chosen & (kind < 0.8), self.mask_token_id, input_ids)
        changed = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), words, changed)
        return changed, labels


def token_masking(tokenizer: PreTrainedTokenizerBase, probability: float = 0.15) -> TokenMasking | None:
    """The masking of a tokenizer's words, None if it has no mask token.

    Example:
        >>> from loopitr import token_masking
        >>> from loopitr.models.processing import word_tokenizer
        >>> token_masking(word_tokenizer(["a", "red", "dog"], max_length=8), 0.3).probability
        0.3
    """
    if tokenizer.mask_token_id is None:
        return None
    return TokenMasking(
        mask_token_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(tokenizer.all_special_ids),
        probability=probability,
    )
