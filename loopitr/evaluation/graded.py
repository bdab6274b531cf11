"""Graded relevance and paraphrase stability of complete rankings, for records whose ground truth says more than which
caption is whose (the built-in scenes). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .nearest import Nearest
from .ranking import jaccard_at_k, mean_average_precision_at_r, ndcg, overlap_at_k
from .reranking import CandidateScores

DEPTH = 10  # of nDCG, overlap and Jaccard index


@dataclass(frozen=True, kw_only=True)
class GradedMetrics:
    """Fractions from 0 to 1; `ndcg` and `map_at_r` by direction: `{"i2t", "t2i"}`.

    ndcg: at 10, with the relevance as the gain. map_at_r: relevant is what has relevance 1.
    overlap, jaccard: at 10, between the image rankings of two captions of one image, mean over all such pairs of
    captions; None where no image has two captions. With fewer than 10 images, at their number.
    """

    ndcg: dict[str, float]
    map_at_r: dict[str, float]
    overlap: float | None
    jaccard: float | None

    @classmethod
    def from_scores(
        cls, image_scores: Tensor, text_scores: Tensor, *, relevance: Tensor, caption_rows: Tensor
    ) -> GradedMetrics:
        """A caption is as relevant to an image as the image that it belongs to.

        Args:
            image_scores: of all captions, for each image `[I, T]`.
            text_scores: of all images, for each caption `[T, I]`.
            relevance: among the images `[I, I]`.
            caption_rows: each caption's image `[T]`; an image's captions are consecutive.
        """
        graded = relevance[:, caption_rows]  # [I, T]
        directions = {"i2t": (image_scores, graded), "t2i": (text_scores, graded.T)}
        overlap, jaccard = paraphrase_stability(text_scores, caption_rows)
        return cls(
            ndcg={name: ndcg(scores, gains, DEPTH) for name, (scores, gains) in directions.items()},
            map_at_r={
                name: mean_average_precision_at_r(scores, gains == 1) for name, (scores, gains) in directions.items()
            },
            overlap=overlap,
            jaccard=jaccard,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            f"ndcg{DEPTH}": self.ndcg,
            "map_at_r": self.map_at_r,
            f"paraphrase_overlap{DEPTH}": self.overlap,
            f"paraphrase_jaccard{DEPTH}": self.jaccard,
        }

    def line(self) -> str:
        """All figures in one line of text."""
        parts = [
            f"nDCG@{DEPTH} i2t {self.ndcg['i2t']:.3f}, t2i {self.ndcg['t2i']:.3f}",
            f"mAP@R i2t {self.map_at_r['i2t']:.3f}, t2i {self.map_at_r['t2i']:.3f}",
        ]
        if self.overlap is not None:
            parts.append(f"paraphrases' overlap@{DEPTH} {self.overlap:.3f}, Jaccard@{DEPTH} {self.jaccard:.3f}")
        return "; ".join(parts)


def grade(
    image_embeds: Tensor,
    text_embeds: Tensor,
    candidates: Nearest,
    reranked: Mapping[str, CandidateScores],
    *,
    relevance: Tensor,
    caption_rows: Tensor,
) -> dict[str, GradedMetrics]:
    """Metrics of the dual encoder and of every reranking of its candidates, by name; all tensors on the CPU.

    Args:
        image_embeds: `[I, E]`; text_embeds: `[T, E]`.
        candidates: what was reranked; `reranked` has their scores by name.
        relevance: `[I, I]`; caption_rows: `[T]`, as for `GradedMetrics.from_scores`.
    """
    with torch.autocast("cpu", enabled=False):
        similarity = image_embeds.float() @ text_embeds.float().T  # [I, T]
    truth = {"relevance": relevance, "caption_rows": caption_rows}
    graded = {"dual": GradedMetrics.from_scores(similarity, similarity.T, **truth)}
    for name, scores in reranked.items():
        image_scores = reranked_first(similarity, candidates.captions, scores.captions)
        text_scores = reranked_first(similarity.T, candidates.images, scores.images)
        graded[name] = GradedMetrics.from_scores(image_scores, text_scores, **truth)
    return graded


def paraphrase_stability(scores: Tensor, caption_rows: Tensor) -> tuple[float, float] | tuple[None, None]:
    """Mean overlap and Jaccard index at 10 between the rankings of any two captions of one image; None without any.

    scores `[T, I]`; caption_rows `[T]`: each caption's image, whose captions are consecutive.
    """
    depth = min(DEPTH, scores.shape[1])
    best = scores.topk(depth, dim=1).indices  # [T, depth]
    first, second = caption_pairs(caption_rows)
    if len(first) == 0:
        return None, None
    return overlap_at_k(best[first], best[second], depth), jaccard_at_k(best[first], best[second], depth)


def caption_pairs(caption_rows: Tensor) -> tuple[Tensor, Tensor]:
    """`[P]` and `[P]`: every pair of captions of one image, each once; an image's captions are consecutive."""
    position = torch.arange(len(caption_rows), device=caption_rows.device)
    firsts, seconds = [position[:0]], [position[:0]]
    for distance in range(1, int(caption_rows.bincount().max())):
        same = caption_rows[:-distance] == caption_rows[distance:]
        firsts.append(position[:-distance][same])
        seconds.append(position[distance:][same])
    return torch.cat(firsts), torch.cat(seconds)


def reranked_first(similarity: Tensor, candidates: Tensor, scores: Tensor) -> Tensor:
    """Scores `[Q, C]` of a complete ranking: the candidates `[Q, k]` by their scores, then the rest by similarity."""
    similarity = similarity.double()
    lifted = scores.double() - scores.min() + similarity.max() + 1  # [Q, k] above every similarity
    return similarity.scatter(1, candidates, lifted)
