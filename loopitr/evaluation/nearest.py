"""Ranks and nearest candidates of the dual head, computed in blocks of rows, so that `[I, T]` is never in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .ranking import BlockRanks, Ranking

BLOCK_ELEMENTS = 2**23  # similarities in memory at a time, besides masks and sorts of this size


@dataclass(frozen=True)
class Nearest:
    """The dual head's complete ranking, and each query's `k` best candidates, best first, all on the CPU.

    Attributes:
        ranking: the ranks of the right answers.
        captions, caption_similarity: `[I, min(k, T)]`, the candidates of each image and their similarities.
        images, image_similarity: `[T, min(k, I)]`, the candidates of each caption and their similarities.
    """

    ranking: Ranking
    captions: Tensor
    caption_similarity: Tensor
    images: Tensor
    image_similarity: Tensor


@torch.no_grad()
def nearest(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_identities: Tensor,
    text_identities: Tensor,
    *,
    k: int,
    block_elements: int = BLOCK_ELEMENTS,
) -> Nearest:
    """Rank image embeds `[I, E]` against text embeds `[T, E]`; equal identities (`[I]`, `[T]` int64) are right answers.

    As everywhere in `ranking`, a wrong candidate that ties with the best right one is ranked before it. Each side's
    identities must all occur on the other side.

    Raises:
        ValueError: embeds hold NaN or infinite values.
    """
    num_images, num_texts = len(image_embeds), len(text_embeds)
    image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
    if not (image_embeds.isfinite().all() and text_embeds.isfinite().all()):
        raise ValueError("the model's embeds hold NaN or infinite values: it cannot be ranked")
    step = max(1, block_elements // max(1, num_texts))

    def blocks() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, num_images, step):
            rows = slice(start, start + step)
            with torch.autocast(image_embeds.device.type, enabled=False):
                similarity = image_embeds[rows] @ text_embeds.T  # [b, T]
            yield rows, similarity, image_identities[rows, None] == text_identities  # [b, T]

    ranks = BlockRanks(num_texts, like=text_embeds)
    captions, caption_similarity = [], []
    images = text_identities.new_zeros(num_texts, 0)
    image_similarity = text_embeds.new_zeros(num_texts, 0)
    for rows, similarity, right in blocks():
        ranks.first_pass(similarity, right)
        top = similarity.topk(min(k, num_texts), dim=1)
        captions.append(top.indices)
        caption_similarity.append(top.values)
        top = similarity.T.topk(min(k, len(similarity)), dim=1)  # [T, <= k]
        values = torch.cat([image_similarity, top.values], 1)
        indices = torch.cat([images, top.indices + rows.start], 1)
        merged = values.topk(min(k, values.shape[1]), dim=1)
        images, image_similarity = indices.gather(1, merged.indices), merged.values
    for _, similarity, right in blocks():  # The products are computed again, since they do not fit into memory.
        ranks.second_pass(similarity, right)
    return Nearest(
        ranking=Ranking(i2t=ranks.of_images().cpu(), t2i=ranks.of_texts().cpu()),
        captions=torch.cat(captions).cpu(),
        caption_similarity=torch.cat(caption_similarity).cpu(),
        images=images.cpu(),
        image_similarity=image_similarity.cpu(),
    )
