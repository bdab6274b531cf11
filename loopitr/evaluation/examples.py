"""Queries to look at: a few of those that reranking gains, loses and leaves as they were, with their first answers."""

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
"""Answers per query and head."""
TURN = ("gained", "lost", "gained", "lost", "gained", "lost", "wrong", "right")
"""Kinds of queries in the order in which they get their places, over and over, as long as there are any left."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer to a query.

    Attributes:
        item: an image, as its position in the records, or a caption.
        score: the dual's similarity; of a reranked answer the match score.
        right: whether it is a right answer.
        place: where the dual has it, from 1.
    """

    item: int | str
    score: float
    right: bool
    place: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query with the first answers of both heads.

    Attributes:
        query: an image, as its position in the records, or a caption.
        kind: by whether the first answer is right, of the dual and reranked: `gained`, `lost`, `wrong`, `right`.
        dual, reranked: the first `SHOWN` answers, best first; `reranked` is empty where nothing is.
        ranks: of the best right answer by the dual and reranked, inf where it is not among the candidates.
    """

    query: int | str
    kind: str
    dual: Sequence[Answer]
    reranked: Sequence[Answer]
    ranks: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Queries of one direction: how many there are of each kind, and the examples, those of one kind together."""

    counts: dict[str, int]
    shown: Sequence[Example]


@dataclass(frozen=True, kw_only=True)
class Reranked:
    """The candidates' match scores, the reranking scores that order them, and the ranking that this gives."""

    match: CandidateScores
    scores: CandidateScores
    ranking: Ranking


def choose_examples(
    candidates: Nearest, gallery: Gallery, reranked: Reranked | None, *, number: int
) -> dict[str, Examples]:
    """At most `number` queries of each direction, `i2t` and `t2i`.

    Both what reranking gains and what it loses get places (`TURN`), and among the queries of a kind those are taken
    that lie evenly in the gallery's order: neither the best nor the worst are picked.

    Args:
        candidates: of the dual head, with at least `SHOWN` of them per query where there are so many.
        reranked: None: only the dual's answers.
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
            # What the candidates are ordered by, and the score that is shown: of the dual, and reranked.
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
    """The first of one query's candidates `items` (k), for each pair of (ordered by, shown) `scores [k]`."""
    orders = [_best_first(by, right) for by, _ in scores]
    place = orders[0].argsort() + 1  # [k]
    return [
        [
            Answer(item=items[at], score=float(shown[at]), right=bool(right[at]), place=int(place[at]))
            for at in order[:SHOWN].tolist()
        ]
        for order, (_, shown) in zip(orders, scores)
    ]


def _kinds(ranks: list[Tensor]) -> dict[str, list[int]]:
    """The queries of each kind, from the ranks `[Q]` of their right answers by the dual and, where it is, reranked."""
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
    """The order `[k]` of candidates: of equal scores the wrong answer comes first, as it does in recalls."""
    wrong_first = right.long().argsort(stable=True)
    return wrong_first[torch.argsort(scores[wrong_first], descending=True, stable=True)]
