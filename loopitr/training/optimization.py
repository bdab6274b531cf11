"""Parameter groups, optimiser and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from loopitr.models.loop_model import LoopITRModel
from loopitr.models.lora import is_adapter
from loopitr.training.options import TrainOptions

BACKBONES = ("vision", "text")
# LoRA's best learning rate is about ten times that of full fine-tuning (thinkingmachines.ai/blog/lora, 2025).
LORA_FACTOR = 10.0


def parameter_groups(
    model: LoopITRModel, *, backbone_lr: float, lr: float, weight_decay: float, lora_lr: float | None = None
) -> list[dict]:
    """The parameter groups: backbones, their LoRA adapters, and new layers, each with and without weight decay.

    Biases, norms, positional embeddings and the temperature have no weight decay.

    Args:
        backbone_lr, lr, lora_lr: the learning rates of backbones, new layers and adapters; `lora_lr` None: ten times
            `backbone_lr`.
    """
    rates = {"backbones": backbone_lr, "adapters": LORA_FACTOR * backbone_lr if lora_lr is None else lora_lr, "new": lr}
    chosen: dict[tuple[str, bool], list[nn.Parameter]] = {(label, d): [] for label in rates for d in (True, False)}
    for part, items in model.parts().items():
        for item in items:
            parameters = [("", item)] if isinstance(item, nn.Parameter) else list(item.named_parameters())
            for name, parameter in parameters:
                if parameter.requires_grad:
                    label = "new" if part not in BACKBONES else "adapters" if is_adapter(name) else "backbones"
                    chosen[label, _decays(name, parameter)].append(parameter)
    return [
        {"params": parameters, "lr": rates[label], "weight_decay": weight_decay if decays else 0.0, "name": label}
        for (label, decays), parameters in chosen.items()
        if parameters
    ]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(word in name for word in ("position", "pos_embed", "cls_token", "reg_token"))


def warmup_cosine(optimizer: torch.optim.Optimizer, *, steps: int, warmup: int, floor: float = 0.0) -> LambdaLR:
    """A linear warm-up over `warmup` steps, then a cosine down to `floor` times the peak rate at `steps`."""
    return LambdaLR(optimizer, lambda step: _factor(step, steps=steps, warmup=warmup, floor=floor))


def warmup_stable_decay(
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    first: int,
    warmup: float,
    decay_start: float,
    backbones: float,
    floor: float = 0.0,
) -> LambdaLR:
    """A linear warm-up, the peak rate, then a linear fall to `floor` times the peak at `steps` (arXiv 2404.06395).

    Args:
        first: the step from which the fusion head scores pairs, and `backbones` applies.
        warmup, decay_start: the fractions of the steps at which the rise ends and the fall begins.
        backbones: a factor on the rate of the backbones' groups (see `parameter_groups`) from step `first` on.
    """
    rise, fall = max(1, int(warmup * steps)), int(decay_start * steps)

    def factor(step: int, scale: float) -> float:
        left = max(0.0, (steps - step) / max(1, steps - fall))  # the fraction of the fall that is left
        value = min(1.0, (step + 1) / rise, floor + (1 - floor) * left)
        return value if step < first else scale * value

    return LambdaLR(optimizer, [partial(factor, scale=scale) for scale in _scales(optimizer, backbones)])


def _scales(optimizer: torch.optim.Optimizer, backbones: float) -> list[float]:
    return [1.0 if group["name"] == "new" else backbones for group in optimizer.param_groups]


def two_cycles(
    optimizer: torch.optim.Optimizer, *, steps: int, first: int, warmup: float, backbones: float, floor: float = 0.0
) -> LambdaLR:
    """Two cycles of warm-up and cosine: one for the `first` steps, another for the rest of `steps`.

    Args:
        warmup: the fraction of each cycle over which the rate rises.
        floor: the rate at the end of each cosine, as a fraction of the peak.
        backbones: a factor on the backbones' rates in the second cycle (see `parameter_groups`).
    """

    def factor(step: int, scale: float) -> float:
        start, length = (0, first) if step < first else (first, steps - first)
        value = _factor(step - start, steps=length, warmup=max(1, int(warmup * length)), floor=floor)
        return value if step < first else scale * value

    return LambdaLR(optimizer, [partial(factor, scale=scale) for scale in _scales(optimizer, backbones)])


def _factor(step: int, *, steps: int, warmup: int, floor: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: LoopITRModel, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW with the groups of `parameter_groups`.

    Raises:
        ValueError: all parts are frozen.
    """
    groups = parameter_groups(
        model,
        backbone_lr=options.backbone_lr,
        lr=options.lr,
        weight_decay=options.weight_decay,
        lora_lr=options.lora_lr,
    )
    if not groups:
        raise ValueError("nothing to train: model.freeze names every part")
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, options: TrainOptions, *, steps: int, fusion_start: int
) -> LambdaLR:
    """The schedule that the options name, for `steps` in total; the fusion head joins at step `fusion_start`."""
    later = options.backbone_lr if options.loop_backbone_lr is None else options.loop_backbone_lr
    scale = later / options.backbone_lr if options.backbone_lr else 1.0
    if options.schedule == "warmup_stable_decay":
        return warmup_stable_decay(
            optimizer,
            steps=steps,
            first=fusion_start,
            warmup=options.warmup,
            decay_start=options.decay_start,
            backbones=scale,
            floor=options.min_lr,
        )
    if fusion_start:
        return two_cycles(
            optimizer, steps=steps, first=fusion_start, warmup=options.warmup, backbones=scale, floor=options.min_lr
        )
    warmup = max(1, int(options.warmup * steps))
    return warmup_cosine(optimizer, steps=steps, warmup=warmup, floor=options.min_lr)


@contextmanager
def options_kept(scheduler: LambdaLR) -> Iterator[None]:
    """A context in which a checkpoint is loaded; afterwards the options of the optimiser are its own again.

    A checkpoint holds the learning rates and the weight decay that it was saved with, and a run may be resumed with
    others. Afterwards the learning rates are those of `scheduler` at the step of the checkpoint.
    """
    optimizer, rates = scheduler.optimizer, list(scheduler.base_lrs)
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
    scheduler.base_lrs = rates
    scheduler._last_lr = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    for group, options, rate in zip(optimizer.param_groups, own, scheduler._last_lr, strict=True):
        group.update(options, lr=rate)
