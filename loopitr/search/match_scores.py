"""The fusion head's scores of a text with the candidates of a search, from stored tokens or from the images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loopitr.data import UnreadableImage, decode_image
from loopitr.evaluation.gallery import evaluation_transform
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.packing import send

from .contents import Contents
from .lance import Found
from .retriever import Retriever
from .stamps import micros_of, stamp_of

BLOCK = 64  # the number of images whose tokens, keys and values are in memory at a time


@torch.inference_mode()
def match_scores(
    retriever: Retriever, text: str, candidates: Sequence[Found], contents: Contents
) -> list[float | None]:
    """Match scores, in the order of the candidates; None for an image that has no tokens and cannot be opened.

    Raises:
        ValueError: the model gives NaN or infinite values.
    """
    model, processor = retriever.model, retriever.processor
    assert isinstance(model, LoopITRModel)
    inputs = processor(text=[text])
    ids, mask = (inputs[name].to(retriever.device) for name in ("input_ids", "attention_mask"))
    texts = model.encode_texts(ids, mask)
    scores: list[float | None] = []
    for start in range(0, len(candidates), BLOCK):
        block = candidates[start : start + BLOCK]
        tokens = _tokens(retriever, block, contents)
        places = [place for place, own in enumerate(tokens) if own is not None]
        match: list[float | None] = [None] * len(block)
        if places:
            stacked = torch.stack([own for own in tokens if own is not None])  # [b, N, D]
            (stacked,) = send([stacked], retriever.device)
            images = model.project_images(model.image_state(stacked))
            pairs = torch.tensor([[row, 0] for row in range(len(places))])
            values = model.score_pairs(images, texts, pairs).score.float().cpu()
            if not values.isfinite().all():
                raise ValueError("the model gives NaN or infinite values: it cannot be used")
            for place, value in zip(places, values.tolist()):
                match[place] = value
        scores += match
    return scores


def _tokens(retriever: Retriever, images: Sequence[Found], contents: Contents) -> list[Tensor | None]:
    """The tokens `[N, D]` of each image (CPU), as stored, or else computed; None: the image cannot be opened."""
    stored = contents.get([image.id for image in images]) if contents.dtype is not None else {}
    missing = [image for image in images if image.id not in stored]
    computed = dict(_computed(retriever, missing, contents)) if missing else {}
    return [stored[image.id].tokens if image.id in stored else computed.get(image.id) for image in images]


def _computed(retriever: Retriever, images: Sequence[Found], contents: Contents) -> Iterator[tuple[int, Tensor]]:
    model = retriever.model
    assert isinstance(model, LoopITRModel)
    transform = evaluation_transform(retriever.processor)
    encoded = contents.get([image.id for image in images if not image.file], encoded=True)
    ids, pixels, changed = [], [], []
    for image in images:
        if image.file and _has_changed(image):
            changed.append(image.path)
            continue
        source = os.fsdecode(image.file) if image.file else encoded[image.id].encoded if image.id in encoded else None
        try:
            opened = decode_image(source or b"", image.path)
        except UnreadableImage:
            continue
        ids.append(image.id)
        pixels.append(transform(opened))
    if changed:
        named = f"{changed[0]} and {len(changed) - 1} other images have" if changed[1:] else f"{changed[0]} has"
        warnings.warn(
            f"{named} changed since the index was made, and cannot be reranked: repeat `loopitr search index`",
            stacklevel=2,
        )
    if ids:
        (stacked,) = send([torch.stack(pixels)], retriever.device)
        tokens = model.dual.vision(stacked.to(next(model.parameters()).dtype))  # [b, N, D]
        yield from zip(ids, tokens.cpu())


def _has_changed(image: Found) -> bool:
    """Whether the file is another one than the vector was made of."""
    try:
        size, micros = stamp_of(os.stat(os.fsdecode(image.file)))
    except OSError:
        return False  # Opening it says why.
    return (size, micros) != (image.columns["size"], micros_of(image.columns["mtime"]))
