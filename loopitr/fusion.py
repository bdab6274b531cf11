"""The fusion encoder: text tokens attend to image tokens, many pairs at once.

BERT layers with cross-attention (self-attention, cross-attention, feed-forward, each post-LN), as in ALBEF (arXiv
2107.07651) and BLIP (arXiv 2201.12086). What makes it fast: an image's keys and values are projected once and all its
pairs attend as one packed query; text is never padded in linear layers; the first self-attention, which has not yet
seen an image, runs once per text; in the last layer only the first token's row is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from loopitr.config import LoopITRConfig
from loopitr.packing import PairLayout, Segments, lay_out, move, segments
from loopitr.states import KeysValues


@dataclass(frozen=True)
class BertParts:
    """The pieces of one post-LN BERT layer, wherever they live."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    attention_norm: nn.Module
    feed_forward_in: nn.Module
    activation: nn.Module
    feed_forward_out: nn.Module
    feed_forward_norm: nn.Module
    dropout: nn.Module
    num_heads: int

    @classmethod
    def of(cls, layer: Any) -> BertParts:
        """The parts of a transformers BERT-type layer (BertLayer, RobertaLayer, ...)."""
        attention, output = layer.attention, layer.output
        return cls(
            query=attention.self.query,
            key=attention.self.key,
            value=attention.self.value,
            attention_output=attention.output.dense,
            attention_norm=attention.output.LayerNorm,
            feed_forward_in=layer.intermediate.dense,
            activation=layer.intermediate.intermediate_act_fn,
            feed_forward_out=output.dense,
            feed_forward_norm=output.LayerNorm,
            dropout=output.dropout,
            num_heads=attention.self.num_attention_heads,
        )


class TextLayer(nn.Module):
    """Self-attention and feed-forward of a `late` fusion layer."""

    def __init__(self, width: int, config: dict) -> None:
        super().__init__()
        eps = config["layer_norm_eps"]
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward_in = nn.Linear(width, config["intermediate_size"])
        self.activation = ACT2FN[config["hidden_act"]]
        self.feed_forward_out = nn.Linear(config["intermediate_size"], width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config["dropout"])
        self.num_heads = config["num_heads"]

    def parts(self) -> BertParts:
        return BertParts(**{name: getattr(self, name) for name in BertParts.__dataclass_fields__})


class CrossAttention(nn.Module):
    """Query from text, key and value from image tokens, output projection and norm."""

    def __init__(self, width: int, image_width: int, config: dict) -> None:
        super().__init__()
        self.num_heads = config["num_heads"]
        self.attention_dropout = config["attention_dropout"]
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(image_width, width)
        self.value = nn.Linear(image_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["dropout"])

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens `[B, N, Dv]` -> keys, values, each `[B, H, N, D / H]`."""
        keys = self.key(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        values = self.value(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return keys, values

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, images: Segments) -> Tensor:
        """`hidden [R, D]`, rows of one image together; `keys`, `values [I, H, N, D / H]`, one per segment."""
        query = self.query(hidden)  # [R, D]
        dropout = self.attention_dropout if self.training else 0.0
        outputs = []
        for bucket in images.buckets:
            whole = len(images.buckets) == 1
            k, v = (keys, values) if whole else (keys[bucket.members], values[bucket.members])
            outputs.append(_attend(query[bucket.rows], k, v, self.num_heads, None, dropout))
        attended = self.dropout(self.output(images.scatter(outputs)))
        return self.norm(attended + hidden)  # [R, D]


def _attend(query: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor | None, dropout: float) -> Tensor:
    """`query [n, M, D]` on `keys`, `values [n, H, N, D / H]` -> `[n, M, D]`; `mask [n, N]` marks real keys."""
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)  # [n, H, M, D / H]
    where = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=where, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)  # [n, M, D]


def _self_attention(parts: BertParts, hidden: Tensor, texts: Segments, firsts: Tensor | None, dropout: float) -> Tensor:
    """Self-attention within each text; with `firsts [P]` only the first tokens ask, and `[P, D]` comes back."""
    asking = hidden if firsts is None else hidden.index_select(0, firsts)  # [R or P, D]
    query, key, value = parts.query(asking), parts.key(hidden), parts.value(hidden)
    outputs = []
    for bucket in texts.buckets:
        k = key[bucket.rows].unflatten(-1, (parts.num_heads, -1)).transpose(1, 2)  # [n, H, M, D / H]
        v = value[bucket.rows].unflatten(-1, (parts.num_heads, -1)).transpose(1, 2)
        q = query[bucket.rows] if firsts is None else query[bucket.members].unsqueeze(1)  # [n, M or 1, D]
        outputs.append(_attend(q, k, v, parts.num_heads, bucket.mask, dropout))
    if firsts is None:
        attended = texts.scatter(outputs)  # [R, D]
    else:
        members = torch.cat([bucket.members for bucket in texts.buckets])
        attended = torch.cat(outputs).squeeze(1).index_select(0, torch.argsort(members))  # [P, D]
    return parts.attention_norm(parts.dropout(parts.attention_output(attended)) + asking)


def _feed_forward(parts: BertParts, hidden: Tensor) -> Tensor:
    inner = parts.activation(parts.feed_forward_in(hidden))
    return parts.feed_forward_norm(parts.dropout(parts.feed_forward_out(inner)) + hidden)  # [R, D]


class FusionEncoder(nn.Module):
    """`num_layers` fusion layers over text tokens that are already computed.

    In style `late` the layers own their text weights; in style `shared` they are handed the text backbone's layers at
    every call and own the cross-attention only.
    """

    def __init__(self, config: LoopITRConfig, *, width: int, image_width: int, num_image_tokens: int) -> None:
        super().__init__()
        options = dict(config.fusion)
        options["num_heads"] = options["num_heads"] or max(1, width // 64)
        options["intermediate_size"] = options["intermediate_size"] or 4 * width
        if width % options["num_heads"]:
            raise ValueError(f"fusion width {width} is not a multiple of num_heads {options['num_heads']}")
        count = options["num_layers"]
        self.attention_dropout: float = options["attention_dropout"]
        self.cross = nn.ModuleList(CrossAttention(width, image_width, options) for _ in range(count))
        self.text: nn.ModuleList | None = None
        if options["style"] == "late":
            self.text = nn.ModuleList(TextLayer(width, options) for _ in range(count))
        self.image_positions: nn.Parameter | None = None
        if options["image_positions"]:
            self.image_positions = nn.Parameter(torch.empty(1, num_image_tokens, image_width).normal_(std=0.02))
        self.gradient_checkpointing = False

    def project(self, tokens: Tensor) -> KeysValues:
        """Image tokens `[B, N, Dv]` -> every layer's keys and values."""
        if self.image_positions is not None:
            tokens = tokens + self.image_positions.to(tokens.dtype)
        return [layer.project(tokens) for layer in self.cross if isinstance(layer, CrossAttention)]

    def forward(
        self,
        packed: Tensor,
        lengths: Tensor,
        keys_values: KeysValues,
        pairs: Tensor,
        *,
        shared_layers: Sequence[nn.Module] | None = None,
        first_only: bool = True,
    ) -> Tensor:
        """Fused tokens of every pair.

        Args:
            packed: `[sum(lengths), D]` text tokens, texts end to end, no padding.
            lengths: `[T]` int64 on the CPU.
            keys_values: per layer, `[B, H, N, D / H]` each, from `project`.
            pairs: `[P, 2]` (image, text) int64 on the CPU, unique and sorted.
            shared_layers: the text backbone's layers, in style `shared`.
            first_only: return the first token of each pair `[P, D]`, else all rows `[R, D]`, pair by pair.
        """
        layout = lay_out(pairs, lengths, packed.device)
        layers: list[BertParts] = [BertParts.of(m) for m in shared_layers] if shared_layers else self._own_parts()
        # Before the first cross-attention nothing depends on the image: once per text, then copied to its pairs.
        dropout = self.attention_dropout if self.training else 0.0
        texts = move(segments(lengths), packed.device)
        rows = layout.source
        if first_only and len(layers) == 1:
            rows = rows.index_select(0, layout.firsts)
        hidden = _self_attention(layers[0], packed, texts, None, dropout).index_select(0, rows)  # [R or P, D]
        for index, parts in enumerate(layers):
            last = first_only and index == len(layers) - 1
            arguments = (index, parts, hidden, keys_values[index], layout, last)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                hidden = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                hidden = self._layer(*arguments)
        return hidden

    def _layer(
        self, index: int, parts: BertParts, hidden: Tensor, kv: tuple[Tensor, Tensor], layout: PairLayout, last: bool
    ) -> Tensor:
        if index > 0:
            dropout = self.attention_dropout if self.training else 0.0
            hidden = _self_attention(parts, hidden, layout.texts, layout.firsts if last else None, dropout)
        keys, values = kv
        if len(layout.used) != len(keys):  # images in no pair
            keys, values = keys[layout.used], values[layout.used]
        hidden = self.cross[index](hidden, keys, values, layout.image_firsts if last else layout.images)
        return _feed_forward(parts, hidden)

    def _own_parts(self) -> list[BertParts]:
        if self.text is None:
            raise ValueError("fusion.style 'shared' needs the text backbone's layers")
        return [layer.parts() for layer in self.text if isinstance(layer, TextLayer)]
