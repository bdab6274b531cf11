"""Retrieval evaluation. `ranking` turns scores into metrics and is pure; `retrieval` encodes, ranks and reranks."""

from .ranking import (
    Ranking,
    candidate_ranks,
    jaccard_at_k,
    mean_average_precision_at_r,
    ndcg,
    overlap_at_k,
    recall_at_k,
)
from .report import RetrievalResult, markdown_table, recall_table
from .retrieval import evaluate_retrieval, evaluation_transform

__all__ = [
    "Ranking",
    "RetrievalResult",
    "candidate_ranks",
    "evaluate_retrieval",
    "evaluation_transform",
    "jaccard_at_k",
    "markdown_table",
    "mean_average_precision_at_r",
    "ndcg",
    "overlap_at_k",
    "recall_at_k",
    "recall_table",
]
