"""What lets a `Retriever` stand where sentence-transformers expects a `CrossEncoder`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ReportedMetrics:
    """What evaluators have reported of a model, by the evaluator's name, where a `CrossEncoder` keeps its model card.

    Example:
        >>> from types import SimpleNamespace
        >>> from loopitr.search.cross_encoding import ReportedMetrics
        >>> reported = ReportedMetrics()
        >>> reported.set_evaluation_metrics(SimpleNamespace(name="photos"), {"map": 0.5})
        >>> reported.metrics
        {'photos': {'map': 0.5}}
    """

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """What an evaluator calls when it is done."""
        self.metrics[getattr(evaluator, "name", "") or type(evaluator).__name__] = dict(metrics)


def shows_progress(show_progress: bool, show_progress_bar: bool | None) -> bool:
    """Whether there is a bar: a `CrossEncoder`'s argument goes before ours where it is given."""
    return show_progress if show_progress_bar is None else show_progress_bar
