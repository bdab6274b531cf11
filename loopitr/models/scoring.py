"""The reranking score: what the cross head says of a pair, and what the dual head says, as one number. Pure."""

from __future__ import annotations

from torch import Tensor

DUAL_ALONE = 1e9
"""A similarity weight so large that the match score only decides between candidates of equal similarity."""


def reranking_score(match: Tensor, similarity: Tensor, weight: float) -> Tensor:
    """Match score + weight x similarity / temperature, in float64.

    Both summands are log-odds. Weight 0 is the match score alone (ALBEF, arXiv 2107.07651), 1 their sum (as BLIP, arXiv
    2201.12086, adds the bare cosine), `DUAL_ALONE` the dual head's order. In float32 a large weight would tie close
    candidates.

    Args:
        match: match scores of any shape.
        similarity: similarity / temperature of the same pairs.
        weight: w >= 0, in a model's config `similarity_weight` (`evaluation/calibration.py` fits it).

    Example:
        >>> import torch
        >>> from loopitr.models.scoring import reranking_score
        >>> reranking_score(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 4.0]), 0.5)
        tensor([2., 1.], dtype=torch.float64)
    """
    return match.double() + weight * similarity.double()
