"""The fusion encoder: text tokens attend to image tokens, for many pairs at once.

It consists of BERT layers with cross-attention (self-attention, cross-attention, feed-forward, each post-LN), as in
ALBEF (arXiv 2107.07651) and BLIP (arXiv 2201.12086). It saves work in four places: an image's keys and values are
projected once, and all its pairs attend to them as one packed query; linear layers see no padding; the first
self-attention does not depend on the image, so it runs once per text; the last layer computes only first tokens.
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

from loopitr.models.config import LoopITRConfig
from loopitr.models.cross_attention import CrossAttention, attend
from loopitr.models.outputs import KeysValues
from loopitr.models.packing import PairLayout, Segments


@dataclass(frozen=True)
class BertParts:
    """The modules of one post-LN BERT layer, whichever class it is."""

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
        """The modules of a BERT-type layer of transformers, such as BertLayer or RobertaLayer."""
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
        """The modules of this layer."""
        return BertParts(**{name: getattr(self, name) for name in BertParts.__dataclass_fields__})


def _self_attention(parts: BertParts, hidden: Tensor, texts: Segments, firsts: Tensor | None, dropout: float) -> Tensor:
    """Self-attention within each text `[R, D]`; with the rows `firsts [P]`, only of the first tokens `[P, D]`."""
    query_rows = hidden if firsts is None else hidden.index_select(0, firsts)  # [R or P, D]
    query, key, value = parts.query(query_rows), parts.key(hidden), parts.value(hidden)
    outputs = []
    for bucket in texts.buckets:
        q = texts.cut(query, bucket) if firsts is None else texts.pick(query, bucket).unsqueeze(1)  # [n, M or 1, D]
        k, v = (texts.cut(x, bucket).unflatten(-1, (parts.num_heads, -1)).transpose(1, 2) for x in (key, value))
        outputs.append(attend(q, k, v, parts.num_heads, bucket.mask, dropout))  # [n, M or 1, D]
    attended = texts.scatter(outputs) if firsts is None else texts.unpick(outputs).squeeze(1)  # [R or P, D]
    return parts.attention_norm(parts.dropout(parts.attention_output(attended)) + query_rows)


def _feed_forward(parts: BertParts, hidden: Tensor) -> Tensor:
    inner = parts.activation(parts.feed_forward_in(hidden))
    return parts.feed_forward_norm(parts.dropout(parts.feed_forward_out(inner)) + hidden)  # [R, D]


class FusionEncoder(nn.Module):
    """`num_layers` fusion layers on the text backbone's tokens.

    In style `late` the encoder has all weights of its layers. In style `shared` it has only the cross-attention, and
    each call passes the text backbone's layers.
    """

    def __init__(self, config: LoopITRConfig, *, width: int, image_width: int, num_image_tokens: int) -> None:
        super().__init__()
        options = dict(config.fusion)
        options["num_heads"] = options["num_heads"] or max(1, width // 64)
        options["intermediate_size"] = options["intermediate_size"] or 4 * width
        if width % options["num_heads"]:
            raise ValueError(f"fusion width {width} is not a multiple of num_heads {options['num_heads']}")
        count = options["num_layers"]
        self.intermediate_size: int = options["intermediate_size"]
        self.attention_dropout: float = options["attention_dropout"]
        self.cross = nn.ModuleList(CrossAttention(width, image_width, options) for _ in range(count))
        self.text: nn.ModuleList | None = None
        if options["style"] == "late":
            self.text = nn.ModuleList(TextLayer(width, options) for _ in range(count))
        self.image_positions: nn.Parameter | None = None
        if options["image_positions"]:
            self.image_positions = nn.Parameter(torch.empty(1, num_image_tokens, image_width).normal_(std=0.02))
        self.gradient_checkpointing = False

    def place(self, tokens: Tensor) -> Tensor:
        """Image tokens `[B, N, Dv]` plus their learned positions, if there are any; all layers attend to these."""
        return tokens if self.image_positions is None else tokens + self.image_positions.to(tokens.dtype)

    def resize_positions(self, num_tokens: int, *, prefix: int) -> None:
        """Interpolate the learned positions of a square grid, if there are any, to `num_tokens` tokens.

        Args:
            prefix: the number of tokens before the grid, whose positions stay; `num_tokens` includes them.
        """
        positions = self.image_positions
        if positions is None:
            return
        old, new = (round((count - prefix) ** 0.5) for count in (positions.shape[1], num_tokens))
        grid = positions[:, prefix:].transpose(1, 2).unflatten(-1, (old, old))
        grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", antialias=True).to(positions.dtype)
        resized = torch.cat([positions[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)  # [1, N, Dv]
        self.image_positions = nn.Parameter(resized.detach().contiguous())

    def project(self, tokens: Tensor) -> KeysValues:
        """Image tokens `[B, N, Dv]` -> every layer's keys and values."""
        return [layer.project(self.place(tokens)) for layer in self._cross()]

    def activation_elements(self, rows: int, images: int, num_tokens: int, *, projected: bool) -> int:
        """About how many elements a forward pass without gradient holds at once, for `rows` text tokens of pairs.

        Args:
            projected: whether the images come with keys and values.
        """
        if not self.cross:
            return 0
        cross = self._cross()[0]
        width, image_width = cross.key.weight.shape
        wide = 2 * self.intermediate_size  # The feed-forward rows, before and after the activation.
        if not projected and cross.absorbs(rows, images, num_tokens):
            wide = max(wide, 2 * cross.num_heads * (image_width + num_tokens))
            return rows * (7 * width + wide)
        return rows * (7 * width + wide) + 2 * images * num_tokens * width

    def forward(
        self,
        packed: Tensor,
        images: Tensor | KeysValues,
        layout: PairLayout,
        *,
        shared_layers: Sequence[nn.Module] | None = None,
        first_only: bool = True,
    ) -> Tensor:
        """Fused tokens of every pair.

        Args:
            packed: `[sum(lengths), D]` text tokens, texts end to end, no padding.
            images: the images of the pairs, in their order: tokens `[I, N, Dv]`, or per layer keys and values
                `[I, H, N, D / H]` from `project`. Each layer attends to tokens as they are or projects them first,
                whichever is cheaper; with a `fixed` layout it always projects them.
            layout: where the tokens of each pair are (`packing.lay_out`).
            shared_layers: the text backbone's layers, in style `shared`.
            first_only: return only the first token of each pair, `[P, D]`, instead of all, `[R, D]`, pair by pair.
        """
        layers: list[BertParts] = [BertParts.of(m) for m in shared_layers] if shared_layers else self._own_parts()
        # The first self-attention does not depend on the image, so it runs once per text.
        dropout = self.attention_dropout if self.training else 0.0
        rows = layout.source
        if first_only and len(layers) == 1:
            rows = rows.index_select(0, layout.firsts)
        attended = _self_attention(layers[0], packed, layout.alone, None, dropout)  # [sum(lengths), D]
        hidden = attended.index_select(0, rows)  # [R or P, D]
        query = self._cross()[0].query(attended).index_select(0, rows)  # [R or P, D]
        if isinstance(images, Tensor):
            images = self.place(images)
        for index, parts in enumerate(layers):
            last = first_only and index == len(layers) - 1
            image = images if isinstance(images, Tensor) else images[index]
            arguments = (index, parts, hidden, None if index else query, image, layout, last)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                hidden = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                hidden = self._layer(*arguments)
        return hidden

    def _layer(
        self,
        index: int,
        parts: BertParts,
        hidden: Tensor,
        query: Tensor | None,
        image: Tensor | tuple[Tensor, Tensor],
        layout: PairLayout,
        last: bool,
    ) -> Tensor:
        cross: Any = self.cross[index]
        if query is None:
            dropout = self.attention_dropout if self.training else 0.0
            hidden = _self_attention(parts, hidden, layout.texts, layout.firsts if last else None, dropout)
            query = cross.query(hidden)  # [R or P, D]
        # A compiled module would be recompiled for each of the two ways, so a fixed layout always projects.
        if isinstance(image, Tensor) and (layout.fixed or not cross.absorbs(len(query), *image.shape[:2])):
            image = cross.project(image)
        return _feed_forward(parts, cross(hidden, query, image, layout.image_firsts if last else layout.images))

    def _cross(self) -> list[CrossAttention]:
        return [layer for layer in self.cross if isinstance(layer, CrossAttention)]

    def _own_parts(self) -> list[BertParts]:
        if self.text is None:
            raise ValueError("fusion.style 'shared' needs the text backbone's layers")
        return [layer.parts() for layer in self.text if isinstance(layer, TextLayer)]
