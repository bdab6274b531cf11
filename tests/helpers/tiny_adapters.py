"""Tiny models with LoRA adapters that have learned something."""

from __future__ import annotations

from typing import Any

import torch
from helpers.support import CNN, tiny_model

from loopitr import LoopITRModel
from loopitr.models.lora import add_lora, is_adapter

RANKS = {"vision_rank": 3, "text_rank": 2}
PAIRS = [[0, 1], [2, 0], [1, 4], [2, 3]]


def plain_model(vision: str = "vit", style: str = "late") -> LoopITRModel:
    model = tiny_model(CNN if vision == "cnn" else None, style)
    for module in model.dual.vision.modules():
        # timm starts a block's last norm at zero, so that the block does nothing.
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return model


def adapted_model(vision: str = "vit", style: str = "late", *, shaken: bool = True, **changes: Any) -> LoopITRModel:
    """`shaken`: the adapters' matrices are random, where they start with one of zeros."""
    model = plain_model(vision, style)
    targets = ["conv1", "conv2", "query", "dense"] if vision == "cnn" else None
    add_lora(model, **{**RANKS, "targets": targets, **changes})
    return shake(model) if shaken else model


@torch.no_grad()
def shake(model: LoopITRModel) -> LoopITRModel:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model: LoopITRModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
