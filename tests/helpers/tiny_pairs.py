"""Folders of random tiny CLIP and SigLIP checkpoints, as transformers writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from helpers.tiny_texts import TOWER
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from loopitr.data import scene_vocabulary
from loopitr.models.processing import word_tokenizer

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {**TOWER, "vocab_size": 120, "hidden_size": 24}


def save_pair(folder: Path, kind: str, vision: dict[str, Any] | None = None) -> str:
    """Every tensor random, with a processor that does not pad as the tower wants it, nor give a mask."""
    vision = {**VISION, **(vision or {})}
    generator = torch.Generator().manual_seed(0)
    model: Any
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16))
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        text = {**TEXT, "projection_size": vision["hidden_size"], "pad_token_id": 1}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.logit_scale.fill_(math.log(100.0 if kind == "clip" else 117.3))
        if kind == "siglip":
            model.logit_bias.fill_(-12.9)
    model.save_pretrained(folder)
    tokenizer = word_tokenizer(scene_vocabulary(), max_length=1000)
    tokenizer.padding_side = "right" if kind == "clip" else "left"
    tokenizer.model_input_names = ["input_ids"]
    tokenizer.save_pretrained(folder)
    return str(folder)
