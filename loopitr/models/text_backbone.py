"""One interface to transformers' text encoders: token ids -> tokens -> pooled vector.

This is the only module that deals with the differences between them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from loopitr.models.config import DualEncoderConfig

QUERY_KEY_VALUE = {"query", "key", "value"}
# Attention that has BERT's modules and computes something else: rotary positions, or an approximation.
OTHER_ATTENTION = {"RoFormerSelfAttention", "MraSelfAttention", "YosoSelfAttention"}
MAX_BUCKETS = 4  # the most buckets that captions are sorted into by length
# Fewer captions than this are faster padded in one call than in two calls.
ROWS = 32
# Buckets whose lengths have a higher ratio than this are joined: they do not save a call's cost.
NEAR = 0.9

# These encoders were trained without an attention mask: they need texts padded on the right to the full length, and
# pool at the last position. AutoModel does not know these model types; the values are transformers' classes.
ALWAYS_FULL = {"siglip_text_model": "SiglipTextModel", "siglip2_text_model": "Siglip2TextModel"}


def _max_length(model: nn.Module) -> int:
    limit = getattr(model.config, "max_position_embeddings", None) or 512
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return limit if padding is None else limit - padding - 1  # RoBERTa's positions start after its padding index.


def _is_bert_layer(layer: nn.Module) -> bool:
    attention = getattr(getattr(layer, "attention", None), "self", None)
    if not isinstance(attention, nn.Module) or type(attention).__name__ in OTHER_ATTENTION:
        return False
    parts = {name for name, _ in attention.named_children()} - {"dropout"}
    output = getattr(layer, "output", None)
    ends = {name for name, _ in output.named_children()} if isinstance(output, nn.Module) else set()
    # The attention of ConvBERT and DeBERTa has more parts, and XMOD's layers end in adapters.
    return parts == QUERY_KEY_VALUE and hasattr(layer, "intermediate") and ends == {"dense", "LayerNorm", "dropout"}


def bert_layers(model: nn.Module) -> list[nn.Module] | None:
    """The encoder layers of a BERT-type model; None for any other."""
    layers = getattr(getattr(model, "encoder", None), "layer", None)
    return list(layers) if layers is not None and all(_is_bert_layer(layer) for layer in layers) else None


def text_class(model_type: str) -> Any:
    """The class of transformers that makes and loads text encoders of this type."""
    return getattr(transformers, ALWAYS_FULL.get(model_type, "AutoModel"))


def _new_text_model(config: PreTrainedConfig) -> Any:
    model_class = text_class(config.model_type)
    return model_class(config) if config.model_type in ALWAYS_FULL else model_class.from_config(config)


def _length_buckets(attention_mask: Tensor) -> list[tuple[Tensor, int]]:
    """Groups of captions of similar length: their rows in the batch and the longest length of each group."""
    positions = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    lengths, order = (attention_mask.bool() * positions).amax(1).sort()
    count = min(MAX_BUCKETS, len(order) // ROWS + 1)
    longest = torch.stack([bucket[-1] for bucket in lengths.chunk(count)]).clamp(min=1).tolist()
    buckets: list[tuple[Tensor, int]] = []
    for rows, length in zip(order.chunk(count), longest, strict=True):
        if buckets and buckets[-1][1] >= NEAR * length:
            rows = torch.cat([buckets.pop()[0], rows])
        buckets.append((rows, length))
    return buckets


def _in_order(parts: list[Tensor], order: Tensor | None) -> Tensor | None:
    """The rows of all buckets in the order of the batch; `order` None: there is one bucket, already in order."""
    if not parts:
        return None
    return torch.cat(parts)[order] if order is not None else parts[0]


@dataclass
class TextOutput:
    """`tokens [T, L, D]` of the last layer; `inner [T, L, D]`, the hidden states that `shared` fusion starts from."""

    tokens: Tensor
    inner: Tensor | None
    pooler_output: Tensor | None


class TextBackbone(nn.Module):
    """Any transformers encoder with a `last_hidden_state` as `[T, L] -> tokens [T, L, D] -> pooled [T, D']`.

    Tokens and pooled vectors do not depend on how far captions are padded on the right. SigLIP's encoder attends to
    padding, so it always gets texts padded to its full length; only the tokens at the caller's positions are returned.
    """

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        arguments = dict(config.text)
        text_config = transformers.AutoConfig.for_model(arguments.pop("model_type"), **arguments)
        text_config = getattr(text_config, "text_config", text_config)
        self.pooling = config.text_pooling
        self.model: Any = _new_text_model(text_config)
        self.width: int = text_config.hidden_size
        self.pooled_width = self.width
        self.max_length = _max_length(self.model)
        self._always_full = text_config.model_type in ALWAYS_FULL
        if self.pooling == "backbone":
            self.pooled_width = self.model.head.out_features if self._always_full else self.width
        elif self._always_full:  # An unused head is removed, since DDP needs a gradient for every parameter.
            self.model.head = nn.Identity()
        elif getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None
        # CLIP and SigLIP take only ids, because their poolers find the end of a text by its id.
        self._needs_ids = "inputs_embeds" not in inspect.signature(self.model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, inner_layer: int | None = None) -> TextOutput:
        """`input_ids`, `attention_mask [T, L]` -> tokens, from one run of the backbone.

        Args:
            inner_layer: also return the input of this layer (0: the embeddings) as `inner`.

        Raises:
            ValueError: `L` is more than the backbone takes.
        """
        if input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"captions of {input_ids.shape[1]} tokens are longer than the text backbone takes ({self.max_length})"
            )
        if self._needs_ids:
            return self._run_ids(input_ids, attention_mask, inner_layer)
        # All buckets share one look-up of the words, because each look-up has a gradient as large as the table.
        words = self.model.get_input_embeddings()(input_ids)
        if torch.compiler.is_compiling():
            return self._run(words, attention_mask, inner_layer)
        # Short and long captions run separately, so that one long caption does not pad all the others.
        buckets = _length_buckets(attention_mask)
        if len(buckets) == 1:
            order, length = None, buckets[0][1]
            parts = [self._run(words[:, :length], attention_mask[:, :length], inner_layer)]
        else:
            order = torch.cat([rows for rows, _ in buckets]).argsort()
            parts = [
                self._run(words[rows, :length], attention_mask[rows, :length], inner_layer) for rows, length in buckets
            ]

        def together(tensors: list[Tensor | None]) -> Tensor | None:
            full = [F.pad(x, (0, 0, 0, input_ids.shape[1] - x.shape[1])) for x in tensors if x is not None]
            return _in_order(full, order)

        tokens = together([part.tokens for part in parts])
        assert tokens is not None
        pooled = [part.pooler_output for part in parts if part.pooler_output is not None]
        return TextOutput(tokens, together([part.inner for part in parts]), _in_order(pooled, order))

    def _run_ids(self, input_ids: Tensor, attention_mask: Tensor, inner_layer: int | None) -> TextOutput:
        hidden = inner_layer is not None
        if not self._always_full:
            return self._named(self.model(input_ids, attention_mask, output_hidden_states=hidden), inner_layer)
        length, pad = input_ids.shape[1], self.model.config.pad_token_id
        ids = input_ids.masked_fill(attention_mask == 0, pad)
        ids = F.pad(ids, (0, self.max_length - length), value=pad)  # [T, full]
        full = self._named(self.model(ids, output_hidden_states=hidden), inner_layer)
        inner = None if full.inner is None else full.inner[:, :length]
        return TextOutput(full.tokens[:, :length], inner, full.pooler_output)  # [T, L, D]

    def _run(self, words: Tensor, attention_mask: Tensor, inner_layer: int | None) -> TextOutput:
        output = self.model(
            inputs_embeds=words, attention_mask=attention_mask, output_hidden_states=inner_layer is not None
        )
        return self._named(output, inner_layer)

    @staticmethod
    def _named(output: Any, inner_layer: int | None) -> TextOutput:
        return TextOutput(
            tokens=output.last_hidden_state,
            inner=None if inner_layer is None else output.hidden_states[inner_layer],
            pooler_output=getattr(output, "pooler_output", None),
        )

    def embed_first(self, token_id: int, count: int) -> Tensor:
        """The input `[T, 1, D]` of layer 0 for `count` texts that begin with this token."""
        words = self.model.get_input_embeddings()
        ids = torch.full((count, 1), token_id, device=words.weight.device)
        return self.model.embeddings(inputs_embeds=words(ids))  # [T, 1, D]

    def pool(self, output: TextOutput, attention_mask: Tensor) -> Tensor:
        """The output for texts with `attention_mask [T, L]` -> pooled `[T, D']`."""
        if self.pooling == "backbone":
            if output.pooler_output is None:
                raise ValueError(f"{type(self.model).__name__} has no pooling of its own; use 'first' or 'mean'")
            return output.pooler_output
        if self.pooling == "first":
            return output.tokens[:, 0]
        mask = attention_mask.unsqueeze(-1).to(output.tokens.dtype)
        return (output.tokens * mask).sum(1) / mask.sum(1).clamp(min=1)  # [T, D]

    @property
    def layers(self) -> list[nn.Module]:
        """The encoder layers of a BERT-type backbone, for `shared` fusion."""
        layers = bert_layers(self.model)
        if layers is None:
            raise ValueError(f"fusion.style 'shared' needs BERT-type layers; {type(self.model).__name__} has none")
        return layers
