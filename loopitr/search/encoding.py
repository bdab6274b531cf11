"""Runs the model on images and texts in batches: embeds of the dual head, reranking scores of pairs.

It uses the code of the evaluation, so that the scores are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loopitr.checks import check_whole
from loopitr.evaluation.gallery import evaluation_transform
from loopitr.evaluation.image_tokens import ImageTokens
from loopitr.evaluation.reranking import score_candidates
from loopitr.evaluation.storage import TokenStorage
from loopitr.evaluation.text_tokens import TextTokens
from loopitr.memory import keep_memory
from loopitr.models.folding import WORTHWHILE
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor

from .inputs import GivenImages

PAIR_BLOCK = 256  # the number of pairs scored at a time


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How work is divided into batches, which does not affect the results.

    Args:
        batch_size: the number of images or texts encoded at a time.
        num_workers: the number of processes that open images given as paths or bytes; 0: none but this one.
        progress: show a progress bar if there is more than one batch.

    Raises:
        ValueError: a number is out of range.
    """

    batch_size: int
    num_workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_whole(1, batch_size=self.batch_size)
        check_whole(0, num_workers=self.num_workers)

    def bar(self, count: int, batch_size: int | None = None) -> bool:
        """Whether to show a progress bar for `count` items; `batch_size` None: that of this object."""
        return self.progress and count > (batch_size or self.batch_size)


def dual_of(model: LoopITRModel | DualEncoder) -> DualEncoder:
    """The dual encoder of a model."""
    return model.dual_encoder() if isinstance(model, LoopITRModel) else model


@torch.inference_mode()
def encode_images(
    model: LoopITRModel | DualEncoder, processor: LoopITRProcessor, images: GivenImages, batching: Batching
) -> Tensor:
    """Embeds `[n, E]` (CPU, float32); only the pixels and tokens of one batch are in memory at a time.

    Raises:
        UnreadableImage: an image cannot be opened.
        ValueError: the model gives NaN or infinite values.
    """
    stream = _stream(model, processor, images, batching)
    encoded = stream.encode(list(range(len(images))), storage=None, progress=batching.bar(len(images)))
    return _finite(encoded.embeds)


@torch.inference_mode()
def encode_texts(
    model: LoopITRModel | DualEncoder, processor: LoopITRProcessor, texts: list[str], batching: Batching
) -> Tensor:
    """Embeds `[n, E]` (CPU, float32). A warning counts the texts that are longer than the model takes.

    Raises:
        ValueError: the model gives NaN or infinite values.
    """
    dual = dual_of(model)
    if not texts:
        return torch.empty(0, dual.config.embed_dim)
    tokens = _tokenized(dual, processor, texts, batching, storage=None)
    return _finite(tokens.encode(torch.arange(len(texts)), progress=batching.bar(len(texts))))


@torch.inference_mode()
def score_pairs(
    model: LoopITRModel,
    processor: LoopITRProcessor,
    images: GivenImages,
    texts: list[str],
    pairs: Tensor,
    batching: Batching,
) -> Tensor:
    """Reranking scores `[P]` (CPU, float64) of `pairs [P, 2]` of (image, text), in any order, repeats allowed.

    Each image is opened and encoded once; the tokens, keys and values of one batch of images are in memory at a time.

    Raises:
        UnreadableImage: an image cannot be opened.
        ValueError: the model gives NaN or infinite values.
    """
    if not len(pairs):
        return torch.empty(0, dtype=torch.float64)
    stream = _stream(model, processor, images, batching)
    device = stream.parameter.device
    tokens = _tokenized(model, processor, texts, batching, storage=TokenStorage())
    text_embeds = tokens.encode(torch.arange(len(texts)), progress=batching.bar(len(texts)))  # [T, E]
    tokens.embeds = text_embeds.to(device)
    image_embeds: list[Tensor] = []

    def blocks() -> Iterator[Tensor]:
        for block in stream.blocks(list(range(len(images))), batching.batch_size):
            image_embeds.append(stream.model.embed_image_tokens(block).float().cpu())
            yield block

    unique, place = pairs.unique(dim=0, return_inverse=True)  # [p, 2] sorted by image, [P]
    progress = batching.bar(len(images)) or batching.bar(len(unique), PAIR_BLOCK)
    match = score_candidates(model, blocks(), tokens, unique, pair_block=PAIR_BLOCK, progress=progress)  # [p]
    image, text = unique.unbind(1)
    similarity = (torch.cat(image_embeds)[image] * text_embeds[text]).sum(1)  # [p]
    return _finite(model.reranking_score(match.to(device), similarity.to(device)))[place]


def score_all(
    model: LoopITRModel | DualEncoder,
    processor: LoopITRProcessor,
    images: GivenImages,
    texts: list[str],
    batching: Batching,
) -> Tensor:
    """Scores `[I * T]` (CPU, float64) of all pairs, image by image.

    They are reranking scores, or similarities if the model is only a dual encoder.

    Raises:
        UnreadableImage: an image cannot be opened.
        ValueError: the model gives NaN or infinite values.
    """
    if isinstance(model, LoopITRModel):
        pairs = torch.cartesian_prod(torch.arange(len(images)), torch.arange(len(texts)))
        return score_pairs(model, processor, images, texts, pairs, batching)
    image_embeds = encode_images(model, processor, images, batching)
    return (image_embeds @ encode_texts(model, processor, texts, batching).T).flatten().double()


def _stream(
    model: LoopITRModel | DualEncoder, processor: LoopITRProcessor, images: GivenImages, batching: Batching
) -> ImageTokens:
    dual = dual_of(model)
    if len(images) >= WORTHWHILE and next(dual.parameters()).device.type == "cpu":
        keep_memory()
    return ImageTokens(
        dual,
        images,
        evaluation_transform(processor),
        cache=None,
        batch_size=batching.batch_size,
        num_workers=batching.num_workers if images.are_files else 0,
        all_readable=True,
        open_in_threads=images.are_files,
    )


def _tokenized(
    model: LoopITRModel | DualEncoder,
    processor: LoopITRProcessor,
    texts: list[str],
    batching: Batching,
    *,
    storage: TokenStorage | None,
) -> TextTokens:
    tokens = TextTokens(model, processor, texts, batch_size=batching.batch_size, storage=storage)
    if tokens.truncated:
        cut = f"{tokens.truncated} of {len(texts)} texts were cut to the {tokens.limit} tokens that the model takes"
        warnings.warn(cut, stacklevel=5)
    return tokens


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError("the model gives NaN or infinite values: it cannot be used")
    return values.cpu()
