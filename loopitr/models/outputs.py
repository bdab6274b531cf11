"""Named outputs of the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

KeysValues = list[tuple[Tensor, Tensor]]  # Each fusion layer has keys and values [B, H, N, D / H].


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
    """Encoded images: `embeds [B, E]`, `tokens [B, N, D]` and, once projected, the fusion layers' keys and values and
    what token agreement compares words with: `regions [B, N, A]`, if the model has it.

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
class TextState:
    """Encoded texts: `embeds [T, E]`, `tokens [T, L, D]` that fusion starts from, `mask [T, L]` of real tokens.

    `score_pairs` reads the mask on the CPU: one that lies there already saves waiting for a GPU.

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
    """`logits [P, 2]` of the ITM head (no match, match); `score [P]`: match score, the log-odds of a match.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> images = model.encode_images(batch["pixel_values"])
        >>> texts = model.encode_texts(batch["input_ids"], batch["attention_mask"])
        >>> scores = model.score_pairs(images, texts, torch.tensor([[0, 1], [2, 2]]))  # (image, text) indices
        >>> scores.score.shape
        torch.Size([2])
    """

    logits: Tensor
    score: Tensor
