"""Tiny models and slow references that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopitr import LoopITRConfig, LoopITRModel, TextState
from loopitr.models.agreement import TokenAgreement
from loopitr.models.fusion import BertParts

VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}
CNN: dict[str, Any] = {"name": "resnet10t", "image_size": 64, "kwargs": {"channels": [8, 16, 24, 32], "stem_width": 8}}
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    **SIZES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def tiny_config(
    vision: dict[str, Any] | None = None, style: str = "late", layers: int = 2, **kwargs: Any
) -> LoopITRConfig:
    kwargs = {"embed_dim": 16, "text": BERT, **kwargs}
    fusion = {"style": style, "num_layers": layers, "num_heads": 4, "intermediate_size": 48, "dropout": 0.0}
    fusion.update(kwargs.pop("fusion", {}))
    return LoopITRConfig(vision=vision or VIT, fusion=fusion, **kwargs)


def tiny_model(*args: Any, seed: int = 0, **kwargs: Any) -> LoopITRModel:
    """A random model; its biases and norms are shaken too, so that a missing one shows."""
    torch.manual_seed(seed)
    model = LoopITRModel(tiny_config(*args, **kwargs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "vision.model" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ragged_texts(count: int = 5, longest: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    """`input_ids [T, L]`, `attention_mask [T, L]` of different lengths, right-padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(5, 60, (count, longest), generator=generator)
    ids[:, 0] = 2
    return ids * mask, mask


def images(count: int = 4, size: int = 32, seed: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def plain_score(model: LoopITRModel, image_tokens: Tensor, text_state: TextState, pairs: Tensor) -> Tensor:
    """The logits `[P, 2]` pair by pair: keys and values projected anew, softmax written out, every row computed."""
    fusion, bare = model.fusion, image_tokens
    if fusion.image_positions is not None:
        image_tokens = image_tokens + fusion.image_positions
    if fusion.text is not None:
        layers = [layer.parts() for layer in fusion.text]
    else:
        count = len(fusion.cross)
        layers = [BertParts.of(layer) for layer in model.dual.text.layers[-count:]]
    rows = []
    for image, text in pairs.tolist():
        hidden = text_state.tokens[text][text_state.mask[text]]  # [L, D]
        for parts, cross in zip(layers, fusion.cross, strict=True):
            attended = _plain_attention(parts.query(hidden), parts.key(hidden), parts.value(hidden), parts.num_heads)
            hidden = parts.attention_norm(parts.attention_output(attended) + hidden)
            tokens = image_tokens[image]  # [N, Dv]
            attended = _plain_attention(cross.query(hidden), cross.key(tokens), cross.value(tokens), cross.num_heads)
            hidden = cross.norm(cross.output(attended) + hidden)
            inner = parts.activation(parts.feed_forward_in(hidden))
            hidden = parts.feed_forward_norm(parts.feed_forward_out(inner) + hidden)
        logits = model.itm_head(hidden[0])
        if model.agreement is not None:
            words = text_state.tokens[text][text_state.mask[text]]  # [L, D]
            logits = torch.stack([logits[0], logits[1] + plain_agreement(model.agreement, bare[image], words)])
        rows.append(logits)
    return torch.stack(rows)


def plain_agreement(agreement: TokenAgreement, image: Tensor, words: Tensor) -> Tensor:
    """Token agreement of one pair, word by word: `image [N, Dv]`, `words [L, D]` without padding -> a scalar."""
    regions = [agreement.region(token) for token in image]
    regions = [region / region.norm() for region in regions]
    gates, scores = [], []
    for token in words:
        word = agreement.word(token)
        word = word / word.norm()
        exponentials = [(agreement.logit_scale.exp() * (word * region).sum()).exp() for region in regions]
        attended = sum(e * region for e, region in zip(exponentials, regions, strict=True)) / sum(exponentials)
        difference = agreement.difference((word - attended) ** 2)
        centred = difference - difference.mean()
        normed = centred / (centred.square().mean() + 1e-12).sqrt() * agreement.norm.weight + agreement.norm.bias
        gates.append(1 / (1 + (-agreement.gate(normed)).exp()))
        scores.append(agreement.score(normed))
    return (sum(gate * score for gate, score in zip(gates, scores, strict=True)) / sum(gates)).squeeze()


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    outputs = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        outputs.append(torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v)
    return torch.cat(outputs, -1)
