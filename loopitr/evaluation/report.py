"""The result of a retrieval evaluation, as JSON and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loopitr.data import LoadReport
from loopitr.models.scoring import DUAL_ALONE

from .calibration import Gain
from .coco import coco_line
from .examples import Examples
from .graded import GradedMetrics
from .ranking import KS, Ranking

# The names of the rankings, and their labels in the table.
HEADS = {"dual": "dual", "match": "match", "match_plus_similarity": "match + similarity", "reranked": "reranked"}


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """The recalls of each head, and their cost.

    Attributes:
        k: the number of candidates per query that were reranked; 0: only the dual encoder was evaluated.
        rankings: `dual` and, if `k > 0`, `match`, `match_plus_similarity` and `reranked` (by the reranking score).
        num_pairs: the number of pairs that the fusion head scored.
        seconds: encode, rank, rerank, total.
        skipped: the number of images and captions evaluated, and what was skipped.
        truncated: the number of captions that were cut to the text backbone's length.
        graded: the graded metrics of each ranking; empty if the records have no graded relevance.
        similarity_weight: the weight in the reranking score; None with `k = 0`.
        calibrated: whether that weight was fitted on these candidates.
        gain: the gain of reranking over the dual encoder; None with `k = 0`.
        examples: example queries by direction (`i2t`, `t2i`); empty if none were asked for.
        shortened: the dual encoder's rankings with embeds cut to `EvaluationOptions.dims`.
        coco: the figures of ECCV Caption and CxC of each ranking; empty if they were not asked for.
    """

    num_images: int
    num_captions: int
    k: int
    rankings: dict[str, Ranking]
    num_pairs: int
    seconds: dict[str, float]
    skipped: LoadReport
    truncated: int
    graded: dict[str, GradedMetrics] = field(default_factory=dict)
    similarity_weight: float | None = None
    calibrated: bool = False
    gain: Gain | None = None
    examples: dict[str, Examples] = field(default_factory=dict)
    shortened: dict[int, Ranking] = field(default_factory=dict)
    coco: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def pairs_per_second(self) -> float | None:
        """The speed of the fusion head; None with `k = 0`."""
        return self.num_pairs / max(self.seconds["rerank"], 1e-9) if self.k else None

    @property
    def ceiling(self) -> dict[str, float] | None:
        """The percentage of queries with a right answer among their `k` candidates: the limit of reranking."""
        return self.rankings["match"].ceiling() if self.k else None

    def _label(self, name: str) -> str:
        if name != "reranked" or self.similarity_weight is None:
            return HEADS[name]
        return f"reranked ({weight_text(self.similarity_weight)})"

    def mean_r1(self) -> dict[str, float]:
        """The mean of both directions' R@1 in percent, by ranking."""
        return {name: ranking.metrics()["mean_r1"] for name, ranking in self.rankings.items()}

    def to_json(self) -> dict[str, Any]:
        """The content of `metrics.json`, with recalls in percent.

        With `k = 0`, the entries of the fusion head are None. Empty `graded`, `shortened` and `coco` are left out.
        """
        graded = {name: metrics.to_json() for name, metrics in self.graded.items()}
        return {
            "num_images": self.num_images,
            "num_captions": self.num_captions,
            "k": self.k,
            **{name: _head(self.rankings.get(name)) for name in HEADS},
            **({"shortened": {str(dim): _head(x) for dim, x in self.shortened.items()}} if self.shortened else {}),
            "similarity_weight": self.similarity_weight,
            "calibrated": self.calibrated,
            "reranking_gain": None if self.gain is None else {"points": self.gain.points, "margin": self.gain.margin},
            "ceiling": self.ceiling,
            **({"graded": graded} if graded else {}),
            **({"coco": self.coco} if self.coco else {}),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "pairs_per_second": self.pairs_per_second,
            "num_pairs": self.num_pairs,
            "skipped": dict(self.skipped.counts),
            "truncated_captions": self.truncated,
        }

    def table(self) -> str:
        """The result as Markdown: a table of recalls, then gain of reranking, size, ceiling, metrics and seconds."""
        shortened = {f"dual, first {dim} dimensions": ranking for dim, ranking in self.shortened.items()}
        rankings = {self._label(name): ranking for name, ranking in self.rankings.items()}
        lines = [recall_table({"dual": rankings["dual"], **shortened, **rankings}), ""]
        if self.gain is not None:
            lines.append(f"- {self.gain.line()}")
            if self.calibrated:
                lines.append("- the similarity weight w was fitted on these same queries")
        lines.append(f"- gallery: {self.skipped.summary()}")
        if self.ceiling is not None:
            ceiling = f"i2t {self.ceiling['i2t']:.1f}, t2i {self.ceiling['t2i']:.1f}"
            lines.append(f"- ceiling of reranking {self.k} candidates: {ceiling}")
        lines += [f"- {HEADS[name]}: {metrics.line()}" for name, metrics in self.graded.items()]
        lines += [f"- {HEADS[name]}: {coco_line(figures)}" for name, figures in self.coco.items()]
        if self.k:
            lines.append(f"- pairs/s: {self.pairs_per_second:.0f} ({self.num_pairs} pairs)")
        lines.append("- seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()))
        if self.truncated:
            lines.append(f"- captions cut to the text backbone's length: {self.truncated}")
        return "\n".join(lines)


def weight_text(weight: float) -> str:
    """A similarity weight as text for tables: `w = 0.35`."""
    return "the dual alone" if weight >= DUAL_ALONE else f"w = {weight:.2g}"


def _head(ranking: Ranking | None) -> dict[str, Any] | None:
    if ranking is None:
        return None
    # JSON has no infinity, so a rank that is not among the candidates becomes None.
    median = {side: rank if math.isfinite(rank) else None for side, rank in ranking.median_rank().items()}
    return {**ranking.metrics(KS), "mean_recall": ranking.mean_recall(KS), "median_rank": median}


def recall_table(rankings: Mapping[str, Ranking]) -> str:
    """A Markdown table with one row per ranking: recalls in percent, in both directions."""
    header = ["", *(f"i2t R@{k}" for k in KS), *(f"t2i R@{k}" for k in KS), "mean R@1"]
    rows = []
    for name, ranking in rankings.items():
        metrics = ranking.metrics(KS)
        values = [*metrics["i2t"].values(), *metrics["t2i"].values(), metrics["mean_r1"]]
        rows.append([name, *(f"{value:.1f}" for value in values)])
    return markdown_table(header, rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is aligned as plain text too: the first column to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = [[x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))] for row in cells]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
