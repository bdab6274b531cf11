"""Cross-attention of packed text tokens to image tokens, an image's keys and values used once for all its texts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from loopitr.models.packing import Segments


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
        """Image tokens `[I, N, Dv]` -> keys, values, each `[I, H, N, D / H]`."""
        return self._heads(self.key(tokens)), self._heads(self.value(tokens))

    def forward(self, hidden: Tensor, query: Tensor, image: Tensor | tuple[Tensor, Tensor], images: Segments) -> Tensor:
        """`hidden`, `query [R, D]`, rows of one image together; `image`: one per segment, tokens or keys and values."""
        if isinstance(image, Tensor):
            attended = self._attend_tokens(query, image, images)
        else:
            attended = self._attend(query, *image, images)
        return self.norm(self.dropout(self.output(attended)) + hidden)  # [R, D]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, images: Segments) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        outputs = []
        for bucket in images.buckets:
            k, v = images.pick(keys, bucket), images.pick(values, bucket)
            outputs.append(attend(images.cut(query, bucket), k, v, self.num_heads, None, dropout))
        return images.scatter(outputs)  # [R, D]

    def _attend_tokens(self, query: Tensor, tokens: Tensor, images: Segments) -> Tensor:
        """The same from the tokens themselves `[I, N, Dv]`: the key weights are applied on the query's side, the value
        weights to the result's. The key's bias moves all of a query's scores alike, so softmax does not see it."""
        heads, width = self.num_heads, query.shape[-1] // self.num_heads
        key, value = (x.weight.unflatten(0, (heads, width)) for x in (self.key, self.value))  # [H, D / H, Dv]
        query, outputs = query * width**-0.5, []
        for bucket in images.buckets:
            x = images.pick(tokens, bucket)  # [n, N, Dv]
            q = images.cut(query, bucket)  # [n, M, D]
            q = (q.reshape(-1, heads, width).transpose(0, 1) @ key).transpose(0, 1)  # [n M, H, Dv]
            scores = q.reshape(len(x), -1, x.shape[2]) @ x.transpose(1, 2)  # [n, M H, N]
            out = scores.softmax(-1).to(x.dtype) @ x  # [n, M H, Dv]
            out = out.view(-1, heads, x.shape[2]).transpose(0, 1) @ value.transpose(1, 2)  # [H, n M, D / H]
            outputs.append(out.transpose(0, 1).reshape(len(x), -1, heads * width))  # [n, M, D]
        # DDP wants a gradient for every trained parameter. The zero is added here and not where `LoopObjective` touches
        # unused parameters, because only this layer knows that it did not read the bias, and because a loss of one's
        # own on `score_pairs` needs it too.
        return images.scatter(outputs) + (self.value.bias + 0 * self.key.bias)  # [R, D]

    def absorbs(self, rows: int, images: int, num_tokens: int) -> bool:
        """Whether `rows` queries on so many images cost less through `_attend_tokens` than projecting the images."""
        width, image_width = self.key.weight.shape
        if self.training and self.attention_dropout:
            return False  # Dropout drops parts of the value's bias too.
        projected = 2 * images * num_tokens * image_width * width + 2 * rows * num_tokens * width
        absorbed = 2 * rows * width * image_width + 2 * rows * self.num_heads * num_tokens * image_width
        return absorbed < projected

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [I, H, N, D / H]


def attend(query: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor | None, dropout: float) -> Tensor:
    """`query [n, M, D]` on `keys`, `values [n, H, N, D / H]` -> `[n, M, D]`; `mask [n, N]` marks real keys."""
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)  # [n, H, M, D / H]
    where = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=where, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)  # [n, M, D]
