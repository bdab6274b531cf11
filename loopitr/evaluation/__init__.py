"""Retrieval evaluation: `retrieval` encodes, ranks and reranks; `ranking` computes the metrics from scores."""

# ruff: noqa: F401 (the imports under TYPE_CHECKING tell type checkers and editors what the names are)

from typing import TYPE_CHECKING

from loopitr.lazy import lazy_names

if TYPE_CHECKING:
    from .gallery import evaluation_transform
    from .gallery_html import gallery_page
    from .options import EvaluationOptions
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
    from .retrieval import evaluate_retrieval
    from .storage import TokenStorage

_MODULES = {
    "EvaluationOptions": ".options",
    "Ranking": ".ranking",
    "RetrievalResult": ".report",
    "TokenStorage": ".storage",
    "candidate_ranks": ".ranking",
    "evaluate_retrieval": ".retrieval",
    "evaluation_transform": ".gallery",
    "gallery_page": ".gallery_html",
    "jaccard_at_k": ".ranking",
    "markdown_table": ".report",
    "mean_average_precision_at_r": ".ranking",
    "ndcg": ".ranking",
    "overlap_at_k": ".ranking",
    "recall_at_k": ".ranking",
    "recall_table": ".report",
}
__all__ = [*_MODULES]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
