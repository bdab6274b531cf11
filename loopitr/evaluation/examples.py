"""Example queries with their first answers: some that reranking gains, loses, or does not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from .gallery import Gallery
from .nearest import Nearest
from .ranking import Ranking
from .reranking import CandidateScores, right_answers

SHOWN = 5
"""Number of answers per query and head."""
TURN = ("gained", "lost", "gained", "lost", "gained", "lost", "wrong", "right")
"""The order in which kinds of queries get a place, repeated until all places are given."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer to a query.

    Attributes:
        item: the position of an image in the records, or a caption.
        score: the similarity or, for a reranked answer, the match score.
        right: whether the answer is right.
        place: its rank by the dual head, from 1.
    """

    item: int | str
    score: float
    right: bool
    place: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query with the first answers of both heads.

    Attributes:
        query: the position of an image in the records, or a caption.
        kind: whether the first answer is right: `gained` (only after reranking), `lost` (only before), `wrong` or
            `right` (both times).
        dual, reranked: the first `SHOWN` answers, best first; `reranked` is empty if there was no reranking.
        ranks: of the best right answer, by the dual head and after reranking; inf if it is not a candidate.
    """

    query: int | str
    kind: str
    dual: Sequence[Answer]
    reranked: Sequence[Answer]
    ranks: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The number of queries of each kind, in one direction, and the examples, sorted by kind."""

    counts: dict[str, int]
    shown: Sequence[Example]


@dataclass(frozen=True, kw_only=True)
class Reranked:
    """The candidates' match scores, their reranking scores, and the ranking by the latter."""

    match: CandidateScores
    scores: CandidateScores
    ranking: Ranking


def choose_examples(
    candidates: Nearest, gallery: Gallery, reranked: Reranked | None, *, number: int
) -> dict[str, Examples]:
    """At most `number` queries of each direction, `i2t` and `t2i`.

    `TURN` says how many there are of each kind. Queries of a kind are chosen at equal distances in the gallery's order,
    not by their scores.

    Args:
        candidates: of the dual head, with at least `SHOWN` per query if the gallery has as many.
        reranked: None: show only the dual head's answers.
    """
    right = right_answers(candidates, gallery)
    images, captions = gallery.positions, gallery.captions
    sides: dict[str, tuple[Sequence[int | str], Sequence[int | str], Tensor, Tensor, str]] = {
        "i2t": (images, captions, candidates.captions, candidates.caption_similarity, "captions"),
        "t2i": (captions, images, candidates.images, candidates.image_similarity, "images"),
    }
    chosen = {}
    for name, (queries, items, rows, similarity, side) in sides.items():
        ranks = [getattr(candidates.ranking, name)] + ([getattr(reranked.ranking, name)] if reranked else [])
        kinds = _kinds(ranks)
        examples = []
        for kind, query in _chosen(kinds, number):
            # Pairs of the scores to rank by and the scores to show, for the dual head and after reranking.
            scores = [(similarity[query], similarity[query])]
            if reranked is not None:
                scores.append((getattr(reranked.scores, side)[query], getattr(reranked.match, side)[query]))
            names = [items[row] for row in rows[query].tolist()]
            dual, *other = _answers(names, getattr(right, side)[query], scores)
            rank = tuple(float(each[query]) for each in ranks)
            examples.append(
                Example(query=queries[query], kind=kind, dual=dual, reranked=other[0] if other else (), ranks=rank)
            )
        chosen[name] = Examples(counts={kind: len(own) for kind, own in kinds.items()}, shown=examples)
    return chosen


def _answers(items: Sequence[int | str], right: Tensor, scores: Sequence[tuple[Tensor, Tensor]]) -> list[list[Answer]]:
    """The first answers of one query among its k candidates `items`, for each pair of `scores [k]`: (rank by, show)."""
    orders = [_best_first(ranked_by, right) for ranked_by, _ in scores]
    place = orders[0].argsort() + 1  # [k]
    return [
        [
            Answer(item=items[at], score=float(shown[at]), right=bool(right[at]), place=int(place[at]))
            for at in order[:SHOWN].tolist()
        ]
        for order, (_, shown) in zip(orders, scores)
    ]


def _kinds(ranks: list[Tensor]) -> dict[str, list[int]]:
    """The queries of each kind, from the ranks `[Q]` of their right answers by the dual head and after reranking."""
    first = [rank <= 1 for rank in ranks]
    dual, last = first[0], first[-1]
    parts = {"gained": ~dual & last, "lost": dual & ~last, "wrong": ~dual & ~last, "right": dual & last}
    return {kind: mask.nonzero()[:, 0].tolist() for kind, mask in parts.items() if len(ranks) > 1 or kind in TURN[-2:]}


def _chosen(kinds: dict[str, list[int]], number: int) -> list[tuple[str, int]]:
    number = min(number, sum(map(len, kinds.values())))
    places: Counter[str] = Counter()
    for kind in cycle(TURN):
        if places.total() >= number:
            break
        if places[kind] < len(kinds.get(kind, ())):
            places[kind] += 1
    return [
        (kind, own[(2 * n + 1) * len(own) // (2 * places[kind])])
        for kind, own in kinds.items()
        for n in range(places[kind])
    ]


def _best_first(scores: Tensor, right: Tensor) -> Tensor:
    """The order `[k]` of candidates; on ties the wrong answer comes first, as in the recalls."""
    wrong_first = right.long().argsort(stable=True)
    return wrong_first[torch.argsort(scores[wrong_first], descending=True, stable=True)]
