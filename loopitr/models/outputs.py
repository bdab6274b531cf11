"""Named outputs of the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

KeysValues = list[tuple[Tensor, Tensor]]  # per fusion layer: keys and values [B, H, N, D / H]


@dataclass
class DualOutput(ModelOutput):
    """`image_embeds [B, E]`, `text_embeds [T, E]` (unit length), `logits_per_image [B, T]` and its transpose."""

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None


@dataclass(frozen=True)
class ImageState:
    """Encoded images: `embeds [B, E]`, `tokens [B, N, D]` and, once projected, the fusion layers' keys and values."""

    embeds: Tensor
    tokens: Tensor
    keys_values: KeysValues | None = None


@dataclass(frozen=True)
class TextFeatures:
    """What the text backbone alone makes of texts: `pooled [T, D']`, `tokens [T, L, D]` that fusion starts from."""

    pooled: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class TextState:
    """Encoded texts: `embeds [T, E]`, `tokens [T, L, D]` that fusion starts from, `mask [T, L]` of real tokens.

    `score_pairs` reads the mask on the CPU: one that lies there already saves waiting for a GPU.
    """

    embeds: Tensor
    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PairScores:
    """`logits [P, 2]` of the ITM head (no match, match); `score [P]`: match score, the log-odds of a match."""

    logits: Tensor
    score: Tensor
