"""Options of tiny models, and folders of pretrained parts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.support import VIT, tiny_model
from helpers.tiny_gallery import tiny_processor
from transformers import BertConfig, BertModel

from loopitr import LoopITRModel, LoopITRProcessor
from loopitr.building.build import build_model
from loopitr.building.options import FusionOptions, ModelOptions, TextOptions, VisionOptions
from loopitr.data import scene_vocabulary
from loopitr.models.processing import word_tokenizer

DEPTH = 4
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40}
CNN = {"channels": [8, 8, 16, 16], "stem_width": 8}


def save_text(folder: Path, model: Any, seed: int = 0) -> str:
    """A text backbone with its tokenizer; every tensor random, so that no two layers are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    word_tokenizer(scene_vocabulary(), max_length=1000).save_pretrained(folder)
    return str(folder)


def save_bert(folder: Path) -> str:
    config = BertConfig(vocab_size=60, num_hidden_layers=DEPTH, **SMALL)
    return save_text(folder, BertModel(config, add_pooling_layer=False))


def save_tiny(folder: Path) -> str:
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def scratch(**changes: Any) -> ModelOptions:
    """The options of a tiny model from scratch for the built-in data."""
    parts = {
        "vision": VisionOptions(name="resnet10t", image_size=32, pretrained=False, kwargs=CNN),
        "text": TextOptions(name="scenes", pretrained=False, max_length=32, kwargs={"num_hidden_layers": 2, **SMALL}),
        "fusion": FusionOptions(num_layers=1, num_heads=4, intermediate_size=48),
        "embed_dim": 16,
    }
    return ModelOptions(**{**parts, **changes})


def with_text(
    name: str, num_layers: int | None = None, fusion: FusionOptions | None = None, **changes: Any
) -> ModelOptions:
    return scratch(
        text=TextOptions(name=name, num_layers=num_layers, **changes),
        fusion=FusionOptions(num_layers=2, init="text_upper_layers") if fusion is None else fusion,
    )


def with_vit(image_size: int, **changes: Any) -> ModelOptions:
    return scratch(vision=VisionOptions(name=VIT["name"], image_size=image_size, kwargs=VIT["kwargs"], **changes))


def build(options: ModelOptions) -> tuple[LoopITRModel, LoopITRProcessor]:
    return build_model(options, vocabulary=scene_vocabulary())
