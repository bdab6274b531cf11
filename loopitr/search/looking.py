"""Searches of somebody who looks on: the candidates of a query stay, so that another order of them costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image

from loopitr.checks import check_at_least
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.scoring import DUAL_ALONE, reranking_score

from .searcher import Hit, Searcher

KEPT = 32  # queries
SIMILAR = 30  # images whose captions are looked through for an image, and of those captions
CAPTIONS = 100  # at most so many
COLUMN = "caption"  # of an index, one caption a line


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A hit at its place, from 1; `dual_place` is where the dual head alone has it."""

    hit: Hit
    place: int
    dual_place: int


class Looking:
    """A searcher that remembers its last queries' candidates and match scores.

    `reranks`: whether its model has a fusion head; `own_weight`: that model's similarity weight; `has_captions`:
    whether the index has any.
    """

    def __init__(self, searcher: Searcher, *, rerank: int = 100) -> None:
        check_at_least(1, rerank=rerank)
        self.searcher, self.rerank = searcher, rerank
        model = searcher.retriever.model
        self.reranks = isinstance(model, LoopITRModel)
        self.own_weight = float(model.config.similarity_weight) if isinstance(model, LoopITRModel) else DUAL_ALONE
        self.has_captions = COLUMN in searcher.info()["columns"]
        self._found = lru_cache(maxsize=KEPT)(self._search)

    def by_text(
        self, text: str, *, top: int, reranked: bool, weight: float | None = None, where: str | None = None
    ) -> list[Placed]:
        """The `top` best images for a text, best first. A text is never taken for the path of an image.

        Args:
            reranked: order by the reranking score instead of the similarity.
            weight: of the similarity in it; None: the model's own.

        Raises:
            ValueError: an empty text, a number out of range, a condition that does not fit the index.
        """
        if not text.strip():
            raise ValueError("the query is empty")
        check_at_least(1, top=top)
        check_at_least(0, weight=weight)
        reranked = reranked and self.reranks
        found = self._found(text, reranked, max(top, self.rerank if reranked else 0), where)
        by_dual = sorted(found, key=lambda hit: -hit.similarity)
        dual_place = {id(hit): place for place, hit in enumerate(by_dual, 1)}
        order = by_dual
        if reranked:
            scores = self._scores(by_dual, self.own_weight if weight is None else weight)
            # Images that could not be scored follow after those that were.
            order = sorted(by_dual, key=lambda hit: (hit.match is None, -scores.get(id(hit), hit.similarity)))
        return [
            Placed(hit=hit, place=place, dual_place=dual_place[id(hit)]) for place, hit in enumerate(order[:top], 1)
        ]

    def by_image(self, image: Image.Image, *, top: int, where: str | None = None) -> list[Placed]:
        """The `top` images most similar to an image, by the dual head.

        Raises:
            ValueError: a number out of range, a condition that does not fit the index.
        """
        found = self.searcher.search(image, top=top, rerank=0, where=where)
        return [Placed(hit=hit, place=place, dual_place=place) for place, hit in enumerate(found, 1)]

    def captions(self, image: Image.Image, *, top: int) -> list[tuple[str, float]]:
        """The `top` best of the captions of the most similar images, with their scores: reranking scores, of a dual
        encoder alone similarities. Empty where the index has no captions.
        """
        texts: dict[str, None] = {}
        for hit in self.searcher.search(image, top=SIMILAR, rerank=0) if self.has_captions else ():
            lines = str(hit.columns.get(COLUMN) or "").splitlines()
            texts.update(dict.fromkeys(line.strip() for line in lines if line.strip()))
        candidates, retriever = [*texts][:CAPTIONS], self.searcher.retriever
        if not candidates:
            return []
        if self.reranks:
            scores = retriever.predict([(text, image) for text in candidates], show_progress=False)
        else:
            vectors = retriever.encode_texts(candidates, show_progress=False)
            scores = retriever.similarity(vectors, retriever.encode_images([image], show_progress=False))[:, 0]
        return sorted(zip(candidates, (float(score) for score in scores)), key=lambda pair: -pair[1])[:top]

    def _search(self, text: str, reranked: bool, count: int, where: str | None) -> tuple[Hit, ...]:
        rerank = self.rerank if reranked else 0
        return tuple(self.searcher.search(text, top=count, rerank=rerank, where=where, as_text=True))

    def _scores(self, hits: list[Hit], weight: float) -> dict[int, float]:
        """Reranking scores of the hits that have a match score."""
        model = self.searcher.retriever.model
        scored = [hit for hit in hits if hit.match is not None]
        if not scored or not isinstance(model, LoopITRModel):
            return {}
        match = torch.tensor([hit.match for hit in scored], dtype=torch.float64)  # [n]
        similarity = torch.tensor([hit.similarity for hit in scored], dtype=torch.float64)  # [n]
        scores = reranking_score(match, similarity * float(model.dual.scale.detach()), weight)
        return dict(zip(map(id, scored), scores.tolist()))
