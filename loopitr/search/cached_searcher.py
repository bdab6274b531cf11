"""A searcher for interactive use: it keeps the candidates of queries, so that changing their order costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image

from loopitr.checks import check_at_least
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.scoring import DUAL_ALONE, reranking_score

from .searcher import Hit, Searcher

KEPT = 32  # the number of queries whose candidates are kept
SIMILAR = 30  # the number of similar images whose captions are candidates for an image
CAPTIONS = 100  # the most of these captions that are scored
COLUMN = "caption"  # the column of an index with captions, one per line


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A hit with its place, from 1, and its place by the dual head alone."""

    hit: Hit
    place: int
    dual_place: int


class CachedSearcher:
    """A searcher that keeps the candidates and match scores of its latest queries.

    Attributes:
        reranks: whether its model has a fusion head.
        own_weight: the similarity weight of its model.
        has_captions: whether the index has captions.
    """

    def __init__(self, searcher: Searcher, *, rerank: int = 100) -> None:
        check_at_least(1, rerank=rerank)
        self.searcher, self.rerank = searcher, rerank
        model = searcher.retriever.model
        self.reranks = searcher.reranks
        self.own_weight = float(model.config.similarity_weight) if isinstance(model, LoopITRModel) else DUAL_ALONE
        self.has_captions = COLUMN in searcher.info()["columns"]
        self._candidates = lru_cache(maxsize=KEPT)(self._search)

    def by_text(
        self, text: str, *, top: int, reranked: bool, weight: float | None = None, where: str | None = None
    ) -> list[Placed]:
        """The `top` best images for a text, best first. The text is never taken for the path of an image.

        Args:
            reranked: order by the reranking score instead of the similarity.
            weight: the similarity weight in that score; None: the model's own.
            where: a condition as in `Searcher.search`.

        Raises:
            ValueError: the text is empty, a number is out of range, or the condition is not valid.
        """
        if not text.strip():
            raise ValueError("the query is empty")
        check_at_least(1, top=top)
        check_at_least(0, weight=weight)
        reranked = reranked and self.reranks
        count = max(top, self.rerank if reranked else 0)
        candidates = self._candidates(text, reranked, count, where, self.searcher.version)
        by_dual = sorted(candidates, key=lambda hit: -hit.similarity)
        dual_place = {id(hit): place for place, hit in enumerate(by_dual, 1)}
        order = by_dual
        if reranked:
            scores = self._scores(by_dual, self.own_weight if weight is None else weight)
            # Images that could not be scored come last.
            order = sorted(by_dual, key=lambda hit: (hit.match is None, -scores.get(id(hit), hit.similarity)))
        return [
            Placed(hit=hit, place=place, dual_place=dual_place[id(hit)]) for place, hit in enumerate(order[:top], 1)
        ]

    def by_image(self, image: Image.Image, *, top: int, where: str | None = None) -> list[Placed]:
        """The `top` images most similar to an image, by the dual head.

        Raises:
            ValueError: a number is out of range, or the condition is not valid.
        """
        hits = self.searcher.search(image, top=top, rerank=0, where=where)
        return [Placed(hit=hit, place=place, dual_place=place) for place, hit in enumerate(hits, 1)]

    def captions(self, image: Image.Image, *, top: int) -> list[tuple[str, float]]:
        """The `top` best among the captions of the most similar images, with their scores, best first.

        Scores are reranking scores, or similarities if the model is only a dual encoder. The result is empty if the
        index has no captions.
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

    def _search(self, text: str, reranked: bool, count: int, where: str | None, version: int) -> tuple[Hit, ...]:
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
