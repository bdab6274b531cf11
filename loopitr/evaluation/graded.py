"""Graded relevance and paraphrase stability of complete rankings, for records with graded ground truth.

The built-in scenes have such ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .nearest import Nearest
from .ranking import jaccard_at_k, mean_average_precision_at_r, ndcg, overlap_at_k
from .reranking import CandidateScores

DEPTH = 10  # the depth of nDCG, overlap and Jaccard index


@dataclass(frozen=True, kw_only=True)
class GradedMetrics:
    """Metrics from 0 to 1. With fewer than 10 images, the depth is their number instead of 10.

    Attributes:
        ndcg: nDCG@10 with the relevance as gain, by direction (`i2t`, `t2i`).
        map_at_r: mAP@R with relevance 1 as relevant, by direction.
        overlap, jaccard: of the top 10 images for two captions of one image, averaged over all such pairs of captions;
            None: no image has two captions.
    """

    ndcg: dict[str, float]
    map_at_r: dict[str, float]
    overlap: float | None
    jaccard: float | None

    @classmethod
    def from_scores(
        cls, image_scores: Tensor, text_scores: Tensor, *, relevance: Tensor, caption_rows: Tensor
    ) -> GradedMetrics:
        """The metrics of scores. A caption is as relevant to an image as the image that it belongs to.

        Args:
            image_scores: the scores of all captions for each image, `[I, T]`.
            text_scores: the scores of all images for each caption, `[T, I]`.
            relevance: of each image to each other, `[I, I]`.
            caption_rows: the image of each caption, `[T]`; an image's captions are consecutive.
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
        """The metrics for `metrics.json`."""
        return {
            f"ndcg{DEPTH}": self.ndcg,
            "map_at_r": self.map_at_r,
            f"paraphrase_overlap{DEPTH}": self.overlap,
            f"paraphrase_jaccard{DEPTH}": self.jaccard,
        }

    def line(self) -> str:
        """All metrics in one line."""
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
    """The metrics of the dual encoder and of each reranking of its candidates, by name; all tensors are on the CPU.

    Args:
        image_embeds, text_embeds: `[I, E]` and `[T, E]`.
        candidates: the answers that were reranked.
        reranked: their scores by the name of the ranking.
        relevance, caption_rows: as in `GradedMetrics.from_scores`.
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
    """Mean overlap and Jaccard index at 10 of the rankings for two captions of one image; None if there are no two.

    scores `[T, I]`; caption_rows `[T]`, the image of each caption; an image's captions are consecutive.
    """
    depth = min(DEPTH, scores.shape[1])
    best = scores.topk(depth, dim=1).indices  # [T, depth]
    first, second = caption_pairs(caption_rows)
    if len(first) == 0:
        return None, None
    return overlap_at_k(best[first], best[second], depth), jaccard_at_k(best[first], best[second], depth)


def caption_pairs(caption_rows: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of captions of one image, each once, as two indices `[P]`; an image's captions are consecutive."""
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
    raised = scores.double() - scores.min() + similarity.max() + 1  # [Q, k], above every similarity
    return similarity.scatter(1, candidates, raised)
