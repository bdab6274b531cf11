"""Optimiser groups and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from loopitr.model import LoopITRModel

BACKBONES = ("vision", "text")


def parameter_groups(model: LoopITRModel, *, backbone_lr: float, lr: float, weight_decay: float) -> list[dict]:
    """Up to four AdamW groups: backbones and new layers, each with and without weight decay.

    Biases, norms, embeddings of positions and the temperature (all of one dimension, or called so) do not decay.
    """
    groups = []
    for names, rate, label in ((BACKBONES, backbone_lr, "backbones"), (("dual_head", "fusion"), lr, "new")):
        chosen: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for part in names:
            for item in model.parts()[part]:
                named = [("", item)] if isinstance(item, nn.Parameter) else list(item.named_parameters())
                for name, parameter in named:
                    if parameter.requires_grad:
                        chosen[_decays(name, parameter)].append(parameter)
        for decays, parameters in chosen.items():
            if parameters:
                decay = weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": label})
    return groups


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(word in name for word in ("position", "pos_embed", "cls_token", "reg_token"))


def warmup_cosine(optimizer: torch.optim.Optimizer, *, steps: int, warmup: int, floor: float = 0.0) -> LambdaLR:
    """Linear warm-up over `warmup` steps, then a cosine down to `floor` times the rate at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
