"""Digests of parts of a model: equal digests mean equal tokens or embeds, so caches and indexes know their model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from loopitr.models.dual_encoder import DualEncoder
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.processing import LoopITRProcessor


def token_cache_key(model: LoopITRModel, processor: LoopITRProcessor) -> str:
    """A digest of everything that image tokens depend on: the image backbone's weights and the transform."""
    return _digest([model.config.vision, processor.image_processor.to_dict()], model.dual.vision)


def text_cache_key(model: LoopITRModel, processor: LoopITRProcessor) -> str:
    """A digest of everything that caption tokens depend on: the text backbone's weights and layers, the tokenizer."""
    config, tokenizer = model.config, processor.tokenizer
    shared = config.fusion["style"] == "shared"  # Its tokens come from below the layers that the fusion head shares.
    parts = [
        config.text,
        config.text_pooling,
        {name: config.fusion[name] for name in ("num_layers", "first_token_id")} if shared else None,
        *_tokenizer_rules(tokenizer),
    ]
    return _digest(parts, model.dual.text)


def dual_key(dual: DualEncoder, processor: LoopITRProcessor) -> str:
    """A digest of everything that embeds depend on: the dual encoder's weights and config, transform and tokenizer.

    A model and the dual encoder exported from it have the same digest.
    """
    config = dual.config
    parts = [
        config.vision,
        config.text,
        config.vision_pooling,
        config.text_pooling,
        processor.image_processor.to_dict(),
        *_tokenizer_rules(processor.tokenizer),
    ]
    return _digest(parts, dual)


def _tokenizer_rules(tokenizer: Any) -> list[Any]:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if fast is None else json.loads(fast.to_str())
    if fast is not None:  # These are the arguments of the latest call, not properties of the tokenizer.
        del rules["truncation"], rules["padding"]
    sides = [tokenizer.truncation_side, tokenizer.padding_side]
    unusual = [sides] if sides != ["right", "right"] else []  # With the usual sides, older digests stay as they are.
    return [type(tokenizer).__name__, tokenizer.model_max_length, rules, *unusual]


def _digest(parts: Any, backbone: nn.Module) -> str:
    """A digest of `parts`, which can be written as JSON, and of a backbone's weights."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
