"""Losses of the cross encoder's heads: image-text matching, ranking and masked language modelling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .means import at_least_float32, check_same_shape, lowest, masked_mean

IGNORE_INDEX = -100


def itm_loss(logits: Tensor, matching: Tensor, valid: Tensor) -> Tensor:
    """Two-way cross entropy (ALBEF, arXiv 2107.07651, eq. 4), mean over the valid pairs.

    logits `[P, 2]` (no match, match), matching and valid `[P]` bool. Pairs that are not valid are ignored, even if they
    hold NaN; with no valid pair the loss is zero.
    """
    _check_pairs(logits, matching, valid)
    logits = torch.where(valid[:, None], at_least_float32(logits), 0.0)  # [P, 2]
    return masked_mean(F.cross_entropy(logits, matching.long(), reduction="none"), valid)


def balanced_itm_loss(logits: Tensor, matching: Tensor, valid: Tensor) -> Tensor:
    """Like `itm_loss`, but matching and non-matching pairs weigh half each, however many there are of each.

    With K negatives per query, positives are only about 1 in 2K + 1 pairs, and training stays long on the plateau of
    always answering "no match". If one kind is missing, the loss is that of the other.
    """
    _check_pairs(logits, matching, valid)
    parts = [(itm_loss(logits, matching, valid & kind), (valid & kind).any()) for kind in (matching, ~matching)]
    present = torch.stack([any_valid for _, any_valid in parts]).sum().clamp(min=1)
    return (parts[0][0] + parts[1][0]) / present


def lce_loss(scores: Tensor, valid: Tensor) -> Tensor:
    """Localized contrastive estimation (arXiv 2101.08751, eq. 3): a query's positive against its own hard negatives.

    Softmax cross entropy over match scores (log-odds) `[Q, 1 + K]`, the positive first; valid `[Q, 1 + K]` bool. Unlike
    `itm_loss` it depends only on the differences within a query, as the order of reranking does. The mean is over the
    queries with a negative; zero with none.
    """
    check_same_shape(scores=scores, valid=valid)
    scores = at_least_float32(scores)
    log_shares = torch.where(valid, scores, lowest(scores)).log_softmax(dim=-1)  # [Q, 1 + K]
    return masked_mean(-log_shares[:, 0], valid[:, 0] & valid[:, 1:].any(dim=-1))


def itm_accuracy(logits: Tensor, matching: Tensor, valid: Tensor) -> Tensor:
    """The share of valid pairs whose larger logit is the right one (ties are wrong); 0 with none. No gradient."""
    _check_pairs(logits, matching, valid)
    log_odds = (logits[:, 1] - logits[:, 0]).detach()  # [P]
    # Ties count as wrong, so that an untrained head with equal logits does not get the share of either class.
    correct = torch.where(matching, log_odds > 0, log_odds < 0)  # [P]
    return masked_mean(correct.float(), valid)


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Masked language modelling (BERT, arXiv 1810.04805): mean cross entropy over tokens whose label is not -100.

    logits `[T, V]`, labels `[T]` int64; zero if every token is ignored, where `F.cross_entropy` gives NaN.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [T, V] and labels [T], got {tuple(logits.shape)} and {tuple(labels.shape)}")
    total = F.cross_entropy(at_least_float32(logits), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _check_pairs(logits: Tensor, matching: Tensor, valid: Tensor) -> None:
    pairs = logits.shape[:1]
    if logits.dim() != 2 or logits.shape[1] != 2 or matching.shape != pairs or valid.shape != pairs:
        shapes = tuple(logits.shape), tuple(matching.shape), tuple(valid.shape)
        raise ValueError(f"expected logits [P, 2], matching [P] and valid [P], got {shapes}")
    if matching.dtype != torch.bool or valid.dtype != torch.bool:
        raise ValueError(f"expected bool matching and valid, got {matching.dtype} and {valid.dtype}")
