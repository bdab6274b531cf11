"""Second stage: the dual's candidates scored by the fusion head, both directions' pairs once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopitr.model import LoopITRModel

from .gallery import Gallery
from .nearest import Nearest
from .ranking import Ranking, candidate_ranks
from .tokens import TextTokens

TEXT_BLOCK = 512  # captions whose tokens are laid out side by side


def candidate_pairs(found: Nearest) -> Tensor:
    """`[P, 2]` int64 on the CPU: the (image, caption) pairs of both directions, each once, sorted by image."""
    images, texts = len(found.captions), len(found.images)
    by_image = _keys(torch.arange(images)[:, None], found.captions.cpu(), texts)
    by_text = _keys(found.images.cpu(), torch.arange(texts)[:, None], texts)
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
    """
    scores = torch.empty(len(pairs))
    image, start = pairs[:, 0].contiguous(), 0
    with tqdm(total=len(pairs), desc="rerank", unit="pair", disable=not progress, leave=False) as bar:
        for tokens in blocks:
            low, high = torch.searchsorted(image, torch.tensor([start, start + len(tokens)])).tolist()
            local, text = image[low:high] - start, pairs[low:high, 1]  # [p]
            start += len(tokens)
            image_state = model.project_images(model.image_state(tokens))
            for chosen, group in _text_groups(text, texts.lengths):
                place = torch.empty(len(texts.lengths), dtype=torch.int64)
                place[group] = torch.arange(len(group))
                own = torch.stack([local[chosen], place[text[chosen]]], 1)  # [c, 2]
                scored = model.score_pairs(image_state, texts.state(group), own, block_size=pair_block)
                scores[low + chosen] = scored.score.float().cpu()
                bar.update(len(chosen))
    return scores


def _text_groups(text: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Captions `text [p]` of pairs -> (which pairs, their captions) in groups of captions of similar length."""
    used = text.unique()
    used = used[torch.argsort(lengths[used], stable=True)]
    place = torch.empty(len(lengths), dtype=torch.int64)
    place[used] = torch.arange(len(used))
    number = place[text] // TEXT_BLOCK  # [p]
    for index, group in enumerate(used.split(TEXT_BLOCK)):
        yield (number == index).nonzero().squeeze(1), group


def rerank(found: Nearest, pairs: Tensor, scores: Tensor, searched: Gallery, *, scale: float) -> dict[str, Ranking]:
    """Rankings of the candidates by `match` score and by `match_plus_similarity`: + similarity * `scale`.

    `scores [P]` of `pairs [P, 2]`, sorted; `scale` is 1 / temperature.
    """
    images, texts = len(found.captions), len(found.images)
    keys = _keys(pairs[:, 0], pairs[:, 1], texts)
    captions, candidates = found.captions.cpu(), found.images.cpu()
    image_side = scores[torch.searchsorted(keys, _keys(torch.arange(images)[:, None], captions, texts))]  # [I, k]
    text_side = scores[torch.searchsorted(keys, _keys(candidates, torch.arange(texts)[:, None], texts))]  # [T, k]
    right_captions = searched.text_identities[captions] == searched.image_identities[:, None]  # [I, k]
    right_images = searched.image_identities[candidates] == searched.text_identities[:, None]  # [T, k]

    def ranking(image_scores: Tensor, text_scores: Tensor) -> Ranking:
        return Ranking(
            i2t=candidate_ranks(image_scores, right_captions, torch.ones_like(right_captions)),
            t2i=candidate_ranks(text_scores, right_images, torch.ones_like(right_images)),
        )

    return {
        "match": ranking(image_side, text_side),
        "match_plus_similarity": ranking(
            image_side + scale * found.caption_similarity.cpu(), text_side + scale * found.image_similarity.cpu()
        ),
    }


def _keys(image: Tensor, text: Tensor, num_texts: int) -> Tensor:
    """A pair as one sortable number."""
    return image * num_texts + text
