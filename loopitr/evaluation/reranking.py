"""The second stage: the fusion head scores the dual head's candidates, each pair once for both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopitr.models.loop_model import LoopITRModel
from loopitr.models.scoring import reranking_score

from .gallery import Gallery
from .nearest import Nearest
from .ranking import Ranking, candidate_ranks
from .text_tokens import TextTokens


def candidate_pairs(candidates: Nearest) -> Tensor:
    """The distinct (image, caption) pairs of both directions, `[P, 2]` int64, sorted by image."""
    images, texts = len(candidates.captions), len(candidates.images)
    by_image = _keys(torch.arange(images)[:, None], candidates.captions, texts)
    by_text = _keys(candidates.images, torch.arange(texts)[:, None], texts)
    keys = torch.cat([by_image.flatten(), by_text.flatten()]).unique()  # [P], sorted
    return torch.stack([keys // texts, keys % texts], 1)


def score_candidates(
    model: LoopITRModel,
    blocks: Iterator[Tensor],
    texts: TextTokens,
    pairs: Tensor,
    *,
    pair_block: int,
    progress: bool = False,
) -> Tensor:
    """Match scores `[P]` (CPU) of `pairs [P, 2]`, sorted by image.

    Args:
        blocks: tokens `[b, N, D]` of consecutive images; keys and values are projected once per block.
        pair_block: the number of pairs scored at a time, and so the most captions whose tokens are in memory.
    """
    image, start = pairs[:, 0].contiguous(), 0
    order: list[Tensor] = []
    scored: list[Tensor] = []  # These stay on the model's device, since waiting for each would stall a GPU.
    with tqdm(
        total=len(pairs), desc="rerank", unit="pair", unit_scale=True, smoothing=0, disable=not progress, leave=False
    ) as bar:
        for tokens in blocks:
            low, high = torch.searchsorted(image, torch.tensor([start, start + len(tokens)])).tolist()
            image_state = model.project_images(model.image_state(tokens))
            # Pairs with captions of similar length are scored together. The longest come first, so that a lack of
            # memory shows at once.
            text = pairs[low:high, 1]
            longest_first = torch.argsort(texts.lengths[text] * len(texts.lengths) + text, descending=True)
            for chosen in (low + longest_first).split(pair_block):
                chosen = chosen.sort().values  # This sorts the pairs by image again.
                group, place = pairs[chosen, 1].unique(return_inverse=True)
                own = torch.stack([image[chosen] - start, place], 1)  # [c, 2], indices into the block and the group
                scored.append(model.score_pairs(image_state, texts.state(group), own, block_size=pair_block).score)
                order.append(chosen)
                bar.update(len(chosen))
            start += len(tokens)
    scores = torch.empty(len(pairs))
    if scored:
        scores[torch.cat(order)] = torch.cat(scored).float().cpu()
    return scores


@dataclass(frozen=True)
class CandidateScores:
    """A value for each candidate of a `Nearest`: for its `captions [I, k]` and its `images [T, k]`."""

    captions: Tensor
    images: Tensor


@dataclass(frozen=True)
class ScoredCandidates:
    """The candidates' `match` scores, their `similarity` / temperature, and whether they are `right` answers (bool)."""

    match: CandidateScores
    similarity: CandidateScores
    right: CandidateScores

    def reranking(self, weight: float) -> CandidateScores:
        """The reranking scores with this similarity weight (`models/scoring.py`)."""
        return CandidateScores(
            reranking_score(self.match.captions, self.similarity.captions, weight),
            reranking_score(self.match.images, self.similarity.images, weight),
        )

    def reranked(self, weight: float) -> dict[str, CandidateScores]:
        """The scores of each reranking, by the name of the ranking in a result."""
        return {
            "match": self.match,
            "match_plus_similarity": self.reranking(1.0),
            "reranked": self.reranking(weight),
        }

    def ranking(self, scores: CandidateScores) -> Ranking:
        """The ranks of the right answers when the candidates are ordered by `scores`."""
        return Ranking(
            i2t=candidate_ranks(scores.captions, self.right.captions, torch.ones_like(self.right.captions)),
            t2i=candidate_ranks(scores.images, self.right.images, torch.ones_like(self.right.images)),
        )


def scored_candidates(
    candidates: Nearest, pairs: Tensor, scores: Tensor, gallery: Gallery, *, scale: float
) -> ScoredCandidates:
    """The candidates of both directions with their scores.

    Args:
        pairs, scores: `[P, 2]`, sorted, and their match scores `[P]`.
        scale: 1 / temperature.
    """
    images, texts = len(candidates.captions), len(candidates.images)
    keys = _keys(pairs[:, 0], pairs[:, 1], texts)
    caption_keys = _keys(torch.arange(images)[:, None], candidates.captions, texts)  # [I, k]
    image_keys = _keys(candidates.images, torch.arange(texts)[:, None], texts)  # [T, k]
    return ScoredCandidates(
        match=CandidateScores(
            scores[torch.searchsorted(keys, caption_keys)],  # [I, k]
            scores[torch.searchsorted(keys, image_keys)],  # [T, k]
        ),
        similarity=CandidateScores(scale * candidates.caption_similarity, scale * candidates.image_similarity),
        right=right_answers(candidates, gallery),
    )


def right_answers(candidates: Nearest, gallery: Gallery) -> CandidateScores:
    """Whether each candidate is right (bool): it has the query's identity."""
    return CandidateScores(
        gallery.text_identities[candidates.captions] == gallery.image_identities[:, None],  # [I, k]
        gallery.image_identities[candidates.images] == gallery.text_identities[:, None],  # [T, k]
    )


def _keys(image: Tensor, text: Tensor, num_texts: int) -> Tensor:
    """One sortable number for each pair."""
    return image * num_texts + text
