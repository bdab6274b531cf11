"""Retrieval evaluation. `ranking` turns scores into metrics and is pure."""

from .ranking import (
    Ranking,
    candidate_ranks,
    jaccard_at_k,
    mean_average_precision_at_r,
    ndcg,
    overlap_at_k,
    recall_at_k,
)

__all__ = [
    "Ranking",
    "candidate_ranks",
    "jaccard_at_k",
    "mean_average_precision_at_r",
    "ndcg",
    "overlap_at_k",
    "recall_at_k",
]
