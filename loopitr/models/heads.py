"""The projections of the dual head, and the optional masked-language-model head on fused tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


def projection(kind: str, width: int, embed_dim: int, *, dropout: float = 0.0) -> nn.Module:
    """Pooled `[B, width]` -> `[B, E]`: `affine`, `linear` (no bias), `mlp` (`MLPProjection`) or `none`.

    Args:
        dropout: for `mlp`; the others have none.

    Raises:
        ValueError: `kind` is `none` and the widths differ.
    """
    if kind == "mlp":
        return MLPProjection(width, embed_dim, dropout=dropout)
    if kind != "none":
        return nn.Linear(width, embed_dim, bias=kind == "affine")
    if width != embed_dim:
        raise ValueError(f"projection 'none' needs embed_dim {width}, the pooled width, got {embed_dim}")
    return nn.Identity()


def limited_scale(log_scale: Tensor, limit: float) -> Tensor:
    """`exp(log_scale)`, at most `limit`. A clamp would leave it there: its gradient is zero, and this one's is not."""
    scale = log_scale.exp()
    return scale - (scale - limit).clamp(min=0).detach()


@torch.no_grad()
def limit_log_scale(log_scale: nn.Parameter, limit: float) -> None:
    """Bring a trained scale that an optimiser step took above `limit` back to it, as CLIP (arXiv 2103.00020) does."""
    if log_scale.requires_grad:
        log_scale.clamp_(max=math.log(limit))


def full_precision(x: Tensor) -> Tensor:
    """Half precision converted to float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def outside_autocast(head: nn.Linear, x: Tensor) -> Tensor:
    """`head(x)` in float32, or float64 where its weights are: a score rounded to bfloat16 ties with close ones."""
    with torch.autocast(x.device.type, enabled=False):
        if head.weight.itemsize >= 4:
            return head(x.to(head.weight.dtype))  # type: ignore[no-any-return]
        bias = None if head.bias is None else full_precision(head.bias)
        return F.linear(full_precision(x), full_precision(head.weight), bias)


def unit_embeds(project: nn.Module, pooled: Tensor) -> Tensor:
    """Pooled `[B, D']` -> embeds `[B, E]`, unit length: the dual head's side of one modality.

    They are float32 even of a model in half precision, in which lengths would differ by up to 0.4 percent.
    """
    return F.normalize(full_precision(project(pooled)), dim=-1)


class MLPProjection(nn.Module):
    """A linear map plus two layers with GELU, both on normalised vectors; made for frozen backbones.

    Dropout on the vectors and between the layers reduces overfitting.
    """

    def __init__(self, width: int, embed_dim: int, *, dropout: float) -> None:
        super().__init__()
        hidden = 2 * embed_dim
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, embed_dim)
        self.hidden = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.output = nn.Linear(hidden, embed_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """`[B, width]` -> `[B, E]`, not normalised."""
        x = self.dropout(self.norm(pooled))  # [B, width]
        inner = self.dropout(self.activation(self.hidden(x)))  # [B, 2 E]
        return self.linear(x) + self.output(inner)  # [B, E]


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
