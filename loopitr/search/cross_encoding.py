"""The parts of sentence-transformers' `CrossEncoder` interface that its evaluators need of a `Retriever`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ReportedMetrics:
    """The metrics that evaluators report to a model, by the evaluator's name; a `CrossEncoder` has its card here.

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
        """Store metrics; an evaluator calls this when it has finished."""
        self.metrics[getattr(evaluator, "name", "") or type(evaluator).__name__] = dict(metrics)


def shows_progress(show_progress: bool, show_progress_bar: bool | None) -> bool:
    """Whether to show a progress bar; `show_progress_bar`, the argument of a `CrossEncoder`, takes precedence."""
    return show_progress if show_progress_bar is None else show_progress_bar
