"""Named outputs of the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

KeysValues = list[tuple[Tensor, Tensor]]  # keys and values [B, H, N, D / H] of each fusion layer


@dataclass
class DualOutput(ModelOutput):
    """`image_embeds [B, E]`, `text_embeds [T, E]` (unit length), `logits_per_image [B, T]` and its transpose.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        >>> output = model.dual_encoder()(pixel_values=batch["pixel_values"], **texts)
        >>> output.logits_per_image.shape
        torch.Size([3, 3])
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None


@dataclass(frozen=True)
class ImageState:
    """Encoded images: `embeds [B, E]` and `tokens [B, N, D]`.

    `model.project_images` adds the fusion layers' `keys_values` and, for token agreement, `regions [B, N, A]`.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> images = model.encode_images(batch["pixel_values"])
        >>> images.embeds.shape, images.keys_values is None
        (torch.Size([3, 256]), True)
    """

    embeds: Tensor
    tokens: Tensor
    keys_values: KeysValues | None = None
    regions: Tensor | None = None


@dataclass(frozen=True)
class TextFeatures:
    """The output of the text backbone alone: `pooled [T, D']` and the tokens `[T, L, D]` that fusion starts from."""

    pooled: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class TextState:
    """Encoded texts: `embeds [T, E]`, the tokens `[T, L, D]` that fusion starts from, and their `mask [T, L]`.

    `score_pairs` reads the mask on the CPU; a mask that is already there saves waiting for a GPU.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> texts = model.encode_texts(batch["input_ids"], batch["attention_mask"])
        >>> texts.tokens.shape
        torch.Size([3, 3, 48])
    """

    embeds: Tensor
    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PairScores:
    """The ITM head's `logits [P, 2]` (no match, match), and the match `score [P]`, the log-odds of a match.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> images = model.encode_images(batch["pixel_values"])
        >>> texts = model.encode_texts(batch["input_ids"], batch["attention_mask"])
        >>> scores = model.score_pairs(images, texts, torch.tensor([[0, 1], [2, 2]]))  # (image, text) indices
        >>> scores.score.shape
        torch.Size([2])
    """

    logits: Tensor
    score: Tensor
