"""The reranking score: the fusion head's and the dual head's score of a pair as one number."""

from __future__ import annotations

from torch import Tensor

DUAL_ALONE = 1e9
"""A similarity weight so large that the match score only decides between candidates of equal similarity."""


def reranking_score(match: Tensor, similarity: Tensor, weight: float) -> Tensor:
    """Match score + weight x similarity / temperature, in float64.

    Weight 0 gives the match score alone (ALBEF, arXiv 2107.07651), 1 the sum (BLIP, arXiv 2201.12086, adds the cosine
    without temperature), and `DUAL_ALONE` the dual head's order. In float32 a large weight would tie close candidates.

    Args:
        match: match scores of any shape.
        similarity: similarity / temperature of the same pairs.
        weight: w >= 0, a model's `config.similarity_weight` (`evaluation/calibration.py` fits it).

    Example:
        >>> import torch
        >>> from loopitr.models.scoring import reranking_score
        >>> reranking_score(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 4.0]), 0.5)
        tensor([2., 1.], dtype=torch.float64)
    """
    return match.double() + weight * similarity.double()
