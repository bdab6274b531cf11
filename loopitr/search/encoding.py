"""Images and texts through the model, in batches and in order: embeds of the dual head, reranking scores of pairs.

These are evaluation's own streams and loops, so that the numbers are evaluation's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loopitr.checks import check_at_least
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

PAIR_BLOCK = 256  # pairs scored at a time


@dataclass(frozen=True, kw_only=True)
class Portions:
    """How the work is portioned out; it changes no number.

    batch_size: images, or texts, that are encoded at a time.
    num_workers: processes that open images, given as paths or bytes; 0: this one does.
    progress: a bar, where there is more than one portion.

    Raises:
        ValueError: a number out of range.
    """

    batch_size: int
    num_workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, num_workers=self.num_workers)

    def bar(self, count: int, at_a_time: int | None = None) -> bool:
        return self.progress and count > (at_a_time or self.batch_size)


def dual_of(model: LoopITRModel | DualEncoder) -> DualEncoder:
    return model.dual_encoder() if isinstance(model, LoopITRModel) else model


@torch.inference_mode()
def encode_images(
    model: LoopITRModel | DualEncoder, processor: LoopITRProcessor, images: GivenImages, portions: Portions
) -> Tensor:
    """Embeds `[n, E]` (CPU, float32); the pixels and tokens of one batch are held at a time.

    Raises:
        UnreadableImage: the first image that cannot be opened.
        ValueError: the model gives NaN or infinite values.
    """
    stream = _stream(model, processor, images, portions)
    encoded = stream.encode(list(range(len(images))), storage=None, progress=portions.bar(len(images)))
    return _finite(encoded.embeds)


@torch.inference_mode()
def encode_texts(
    model: LoopITRModel | DualEncoder, processor: LoopITRProcessor, texts: list[str], portions: Portions
) -> Tensor:
    """Embeds `[n, E]` (CPU, float32). One warning counts the texts that are longer than the model takes.

    Raises:
        ValueError: the model gives NaN or infinite values.
    """
    dual = dual_of(model)
    if not texts:
        return torch.empty(0, dual.config.embed_dim)
    tokens = _tokenized(dual, processor, texts, portions, storage=None)
    return _finite(tokens.encode(torch.arange(len(texts)), progress=portions.bar(len(texts))))


@torch.inference_mode()
def score_pairs(
    model: LoopITRModel,
    processor: LoopITRProcessor,
    images: GivenImages,
    texts: list[str],
    pairs: Tensor,
    portions: Portions,
) -> Tensor:
    """Reranking scores `[P]` (CPU, float64) of `pairs [P, 2]` of (image, text), in any order, repeats allowed.

    Each image is opened and encoded once, and the tokens, keys and values of one batch of images are held at a time.

    Raises:
        UnreadableImage: the first image that cannot be opened.
        ValueError: the model gives NaN or infinite values.
    """
    if not len(pairs):
        return torch.empty(0, dtype=torch.float64)
    stream = _stream(model, processor, images, portions)
    device = stream.parameter.device
    tokens = _tokenized(model, processor, texts, portions, storage=TokenStorage())
    text_embeds = tokens.encode(torch.arange(len(texts)), progress=portions.bar(len(texts)))  # [T, E]
    tokens.embeds = text_embeds.to(device)
    image_embeds: list[Tensor] = []

    def blocks() -> Iterator[Tensor]:
        for block in stream.blocks(list(range(len(images))), portions.batch_size):
            image_embeds.append(stream.model.embed_image_tokens(block).float().cpu())
            yield block

    unique, place = pairs.unique(dim=0, return_inverse=True)  # [p, 2] sorted by image, [P]
    progress = portions.bar(len(images)) or portions.bar(len(unique), PAIR_BLOCK)
    match = score_candidates(model, blocks(), tokens, unique, pair_block=PAIR_BLOCK, progress=progress)  # [p]
    image, text = unique.unbind(1)
    similarity = (torch.cat(image_embeds)[image] * text_embeds[text]).sum(1)  # [p]
    return _finite(model.reranking_score(match.to(device), similarity.to(device)))[place]


def score_all(
    model: LoopITRModel | DualEncoder,
    processor: LoopITRProcessor,
    images: GivenImages,
    texts: list[str],
    portions: Portions,
) -> Tensor:
    """Scores `[I * T]` (CPU, float64) of all pairs, image by image: reranking scores, of a dual encoder alone
    similarities.

    Raises:
        UnreadableImage: the first image that cannot be opened.
        ValueError: the model gives NaN or infinite values.
    """
    if isinstance(model, LoopITRModel):
        pairs = torch.cartesian_prod(torch.arange(len(images)), torch.arange(len(texts)))
        return score_pairs(model, processor, images, texts, pairs, portions)
    image_embeds = encode_images(model, processor, images, portions)
    return (image_embeds @ encode_texts(model, processor, texts, portions).T).flatten().double()


def _stream(
    model: LoopITRModel | DualEncoder, processor: LoopITRProcessor, images: GivenImages, portions: Portions
) -> ImageTokens:
    dual = dual_of(model)
    if len(images) >= WORTHWHILE and next(dual.parameters()).device.type == "cpu":
        keep_memory()
    return ImageTokens(
        dual,
        images,
        evaluation_transform(processor),
        cache=None,
        batch_size=portions.batch_size,
        num_workers=portions.num_workers if images.are_files else 0,
        all_readable=True,
        open_in_threads=images.are_files,
    )


def _tokenized(
    model: LoopITRModel | DualEncoder,
    processor: LoopITRProcessor,
    texts: list[str],
    portions: Portions,
    *,
    storage: TokenStorage | None,
) -> TextTokens:
    tokens = TextTokens(model, processor, texts, batch_size=portions.batch_size, storage=storage)
    if tokens.truncated:
        cut = f"{tokens.truncated} of {len(texts)} texts were cut to the {tokens.limit} tokens that the model takes"
        warnings.warn(cut, stacklevel=5)
    return tokens


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError("the model gives NaN or infinite values: it cannot be used")
    return values.cpu()
