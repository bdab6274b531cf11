"""Encoded images and texts of all ranks, for mining and token agreement across ranks."""

from __future__ import annotations

from loopitr.distributed import all_gather, all_gather_padded, world_size
from loopitr.models.outputs import ImageState, TextState


def gather_images(images: ImageState, rows: list[int]) -> ImageState:
    """The images of all ranks, in rank order, with gradient of their tokens; `rows` is the number on each rank.

    Keys and values are left out: they are projected later, only for the images that this rank's pairs need.
    """
    if world_size() == 1:
        return images
    embeds, tokens = all_gather(images.embeds, rows=rows), all_gather(images.tokens, gradient=True, rows=rows)
    return ImageState(embeds=embeds, tokens=tokens)


def gather_texts(texts: TextState, rows: list[int]) -> TextState:
    """The texts of all ranks, in rank order, with gradient of their tokens; `rows` is the number on each rank."""
    if world_size() == 1:
        return texts
    mask = all_gather_padded(texts.mask.long(), rows=rows).bool()
    tokens = all_gather_padded(texts.tokens, gradient=True, rows=rows)
    return TextState(embeds=all_gather(texts.embeds, rows=rows), tokens=tokens, mask=mask)
