"""The three parts of a model as plain modules that `torch.export` can trace.

The fusion encoder packs its texts (`models/packing.py`), which depends on the data and so cannot be traced. Here the
same layers run on padded texts, for all images with all texts; padding is masked, so the scores are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loopitr.models.cross_attention import CrossAttention, attend
from loopitr.models.fusion import BertParts, TextLayer
from loopitr.models.heads import unit_embeds
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.towers import ImageTower, TextTower


class ImageGraph(nn.Module):
    """Pixels -> embeds and, if the model has a fusion head, image tokens."""

    def __init__(self, model: LoopITRModel | DualEncoder | ImageTower) -> None:
        super().__init__()
        dual = model.dual_encoder() if isinstance(model, LoopITRModel) else model
        self.backbone, self.projection = dual.vision, dual.vision_projection
        self.with_tokens = isinstance(model, LoopITRModel)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """`[B, 3, S, S]` -> `image_embeds [B, E]`, `image_tokens [B, N, Dv]`."""
        tokens = self.backbone(pixel_values)
        embeds = unit_embeds(self.projection, self.backbone.pool(tokens))
        return (embeds, tokens) if self.with_tokens else (embeds,)


class TextGraph(nn.Module):
    """Token ids -> embeds and, if the model has a fusion head, the text tokens that it starts from."""

    def __init__(self, model: LoopITRModel | DualEncoder | TextTower) -> None:
        super().__init__()
        self.model = model
        self.with_tokens = isinstance(model, LoopITRModel)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """`[T, L]`, `[T, L]` -> `text_embeds [T, E]`, `text_tokens [T, L, D]`."""
        if not isinstance(self.model, LoopITRModel):
            return (self.model.get_text_features(input_ids, attention_mask),)
        features = self.model.text_features(input_ids, attention_mask)
        return self.model.dual.embed_pooled_texts(features.pooled), features.tokens


class FusionGraph(nn.Module):
    """Image tokens and text tokens -> the match score of every image with every text."""

    def __init__(self, model: LoopITRModel) -> None:
        super().__init__()
        self.fusion, self.itm_head, self.agreement = model.fusion, model.itm_head, model.agreement
        own, count = model.fusion.text, len(model.fusion.cross)
        self.shared = None if own is not None else nn.ModuleList(model.dual.text.layers[-count:])

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """`[I, N, Dv]`, `[T, L, D]`, `[T, L]` of texts padded on the right -> match scores `[I, T]`."""
        images, (texts, length) = image_tokens.shape[0], text_tokens.shape[:2]
        mask = attention_mask.bool()
        every_mask = mask.unsqueeze(0).expand(images, texts, length).flatten(0, 1)  # [I T, L]
        placed = self.fusion.place(image_tokens)  # [I, N, Dv]
        layers = self._layers()
        if self.itm_head is None:
            return self._agree(image_tokens, text_tokens, mask)
        hidden = text_tokens
        for index, (parts, cross) in enumerate(layers):
            # The last layer only needs the row of the first token.
            query_rows = hidden[:, :1] if index == len(layers) - 1 else hidden
            hidden = _self_attention(parts, query_rows, hidden, every_mask if index else mask)  # [T or I T, L or 1, D]
            if index == 0:  # The first self-attention does not depend on the image, so it runs once per text.
                hidden = hidden.unsqueeze(0).expand(images, -1, -1, -1)  # [I, T, L or 1, D]
            hidden = _cross_attention(cross, hidden.reshape(images, -1, hidden.shape[-1]), placed)  # [I, T L, D]
            inner = parts.activation(parts.feed_forward_in(hidden))
            hidden = parts.feed_forward_norm(parts.feed_forward_out(inner) + hidden)
            hidden = hidden.reshape(images * texts, -1, hidden.shape[-1])  # [I T, L or 1, D]
        logits = self.itm_head(hidden[:, 0])  # [I T, 2]
        scores = (logits[:, 1] - logits[:, 0]).reshape(images, texts)
        return scores if self.agreement is None else scores + self._agree(image_tokens, text_tokens, mask)

    def _agree(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Token agreement `[I, T]`."""
        agreement: Any = self.agreement
        words = agreement.project_words(text_tokens.flatten(0, 1))  # [T L, A]
        compared = agreement.gates_and_scores(words, agreement.project_regions(image_tokens))  # [I, T L, 2]
        gates, scores = compared.reshape(len(image_tokens), *mask.shape, 2).unbind(-1)  # [I, T, L]
        gates = torch.where(mask, gates.sigmoid(), 0.0)
        total = gates.sum(-1).clamp(min=torch.finfo(gates.dtype).tiny)
        return (gates * scores).sum(-1) / total

    def _layers(self) -> list[tuple[BertParts, CrossAttention]]:
        own = self.shared if self.shared is not None else self.fusion.text
        assert own is not None
        parts = [layer.parts() if isinstance(layer, TextLayer) else BertParts.of(layer) for layer in own]
        cross = [layer for layer in self.fusion.cross if isinstance(layer, CrossAttention)]
        return list(zip(parts, cross, strict=True))


def _self_attention(parts: BertParts, query_rows: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """The rows `query_rows [n, M, D]` attend to `hidden [n, L, D]` with real tokens `mask [n, L]` -> `[n, M, D]`."""
    key, value = (x(hidden).unflatten(-1, (parts.num_heads, -1)).transpose(1, 2) for x in (parts.key, parts.value))
    attended = attend(parts.query(query_rows), key, value, parts.num_heads, mask, 0.0)
    return parts.attention_norm(parts.attention_output(attended) + query_rows)


def _cross_attention(cross: CrossAttention, hidden: Tensor, images: Tensor) -> Tensor:
    """`hidden [I, M, D]`, each row of which attends to its own image of `images [I, N, Dv]` -> `[I, M, D]`."""
    keys, values = cross.project(images)
    attended = attend(cross.query(hidden), keys, values, cross.num_heads, None, 0.0)
    return cross.norm(cross.output(attended) + hidden)
