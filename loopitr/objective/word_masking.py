"""The choice of the tokens that masked language modelling hides (BERT, arXiv 1810.04805)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopitr.objective.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPTIONS_PER_CALL = 1000  # of the tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenMasking:
    """Masks tokens: `(input_ids [B, L], attention_mask [B, L]) -> (masked ids, labels)`, labels -100 elsewhere.

    Each token that is neither padding nor special is chosen with `probability`, and at least one of every caption. Of
    the chosen tokens, 80% become the mask token, 10% a random token, and 10% stay. `common_ids` are chosen only in
    captions that have no other words.
    """

    mask_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    common_ids: tuple[int, ...] = ()
    probability: float = 0.3

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        words = attention_mask.bool() & ~_among(input_ids, self.special_ids)  # [B, L]
        content = words & ~_among(input_ids, self.common_ids)
        maskable = torch.where(content.any(1, keepdim=True), content, words)
        draw = torch.rand(input_ids.shape, device=input_ids.device).masked_fill(~maskable, torch.inf)  # [B, L]
        chosen = draw < self.probability
        lowest = draw == draw.amin(1, keepdim=True)
        chosen |= lowest & maskable & ~chosen.any(1, keepdim=True)
        labels = input_ids.where(chosen, IGNORE_INDEX)
        kind = torch.rand_like(draw)
        random_ids = torch.randint_like(input_ids, self.vocab_size)
        masked = torch.where(chosen & (kind < 0.8), self.mask_token_id, input_ids)
        masked = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random_ids, masked)
        return masked, labels


def token_masking(
    tokenizer: PreTrainedTokenizerBase, probability: float = 0.3, *, common_ids: Iterable[int] = ()
) -> TokenMasking | None:
    """The masking for a tokenizer; None if it has no mask token. `common_ids` are masked only where nothing else is.

    Example:
        >>> import torch
        >>> from loopitr import token_masking
        >>> from loopitr.models.processing import word_tokenizer
        >>> tokenizer = word_tokenizer(["a", "red", "dog"], max_length=8)
        >>> inputs = tokenizer(["a red dog"], return_tensors="pt")
        >>> masked, labels = token_masking(tokenizer, 0.5)(inputs["input_ids"], inputs["attention_mask"])
        >>> bool((labels != -100).any()), masked.shape == labels.shape
        (True, True)
    """
    if tokenizer.mask_token_id is None:
        return None
    return TokenMasking(
        mask_token_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(tokenizer.all_special_ids),
        common_ids=tuple(common_ids),
        probability=probability,
    )


def common_tokens(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str], share: float) -> tuple[int, ...]:
    """The ids of tokens that occur in at least `share` of the captions, such as articles and punctuation.

    Unlike a list of stop words, counting works for every language.
    """
    counts: Counter[int] = Counter()
    total = 0
    batch: list[str] = []

    def count() -> None:
        if batch:
            for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
                counts.update(set(ids))
            batch.clear()

    for caption in captions:
        batch.append(caption)
        total += 1
        if len(batch) == CAPTIONS_PER_CALL:
            count()
    count()
    return tuple(sorted(token for token, number in counts.items() if number >= share * total))


def _among(input_ids: Tensor, ids: tuple[int, ...]) -> Tensor:
    return torch.isin(input_ids, torch.tensor(ids, dtype=input_ids.dtype, device=input_ids.device))
