"""Heads: the dual head's projections, and the optional masked-language-model head on fused tokens (pre-training)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


def projection(kind: str, width: int, embed_dim: int) -> nn.Module:
    """Pooled `[B, width]` -> `[B, E]`: `affine`, `linear` (no bias) or `none`.

    Raises:
        ValueError: `none` where the widths differ.
    """
    if kind != "none":
        return nn.Linear(width, embed_dim, bias=kind == "affine")
    if width != embed_dim:
        raise ValueError(f"projection 'none' needs embed_dim {width}, the pooled width, got {embed_dim}")
    return nn.Identity()


class MLMHead(nn.Module):
    """BERT's prediction head: dense, activation, LayerNorm, then the word embeddings as output weights."""

    def __init__(self, embeddings: nn.Module, config: PreTrainedConfig) -> None:
        super().__init__()
        vocab_size, embed_width = embeddings.weight.shape  # type: ignore[union-attr,misc]
        self.dense = nn.Linear(config.hidden_size, int(embed_width))
        self.activation = ACT2FN[getattr(config, "hidden_act", "gelu")]
        self.norm = nn.LayerNorm(int(embed_width), eps=getattr(config, "layer_norm_eps", 1e-12))
        self.bias = nn.Parameter(torch.zeros(int(vocab_size)))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """`hidden [R, D]`, `word_embeddings [V, D]` of the text backbone -> logits `[R, V]`."""
        hidden = self.norm(self.activation(self.dense(hidden)))
        return hidden @ word_embeddings.T + self.bias  # [R, V]
