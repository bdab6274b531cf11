"""Cross-attention of packed text tokens to image tokens; all texts of an image share its keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from loopitr.models.packing import Segments


class CrossAttention(nn.Module):
    """Queries from text tokens, keys and values from image tokens, then an output projection and a norm."""

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
        """The text tokens `[R, D]` after cross-attention, with residual and norm.

        Args:
            hidden, query: `[R, D]`, the rows of one image together.
            image: one per segment, tokens or keys and values.
            images: the segments of the rows by image.
        """
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
        """Attend to `tokens [I, N, Dv]` without projecting them.

        The key weights are applied to the queries and the value weights to the results. The key's bias adds the same
        number to all scores of a query, which softmax cancels.
        """
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
        # DDP needs a gradient for every trained parameter. The zero is added here and not in `LoopObjective`, because
        # only this layer knows that it did not use the bias, and any other loss on `score_pairs` needs it too.
        return images.scatter(outputs) + (self.value.bias + 0 * self.key.bias)  # [R, D]

    def absorbs(self, rows: int, images: int, num_tokens: int) -> bool:
        """Whether `_attend_tokens` costs less than projecting the images, for `rows` queries in total."""
        width, image_width = self.key.weight.shape
        if self.training and self.attention_dropout:
            return False  # `_attend_tokens` has no attention dropout.
        projected = 2 * images * num_tokens * image_width * width + 2 * rows * num_tokens * width
        absorbed = 2 * rows * width * image_width + 2 * rows * self.num_heads * num_tokens * image_width
        return absorbed < projected

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [I, H, N, D / H]


def attend(query: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor | None, dropout: float) -> Tensor:
    """`query [n, M, D]`, `keys` and `values [n, H, N, D / H]` -> `[n, M, D]`; `mask [n, N]` is true at real keys."""
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)  # [n, H, M, D / H]
    attention_mask = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=attention_mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)  # [n, M, D]
