"""A run that has diverged is stopped: its model is neither trained on, nor validated, nor kept."""

from __future__ import annotations

import math

import torch
from torch import nn

from loopitr.objective.parts import StepOutput


def check_finite(model: nn.Module, *, step: int) -> None:
    """
    Raises:
        ValueError: a weight or a buffer of the model is not finite; the first one is named.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"the model has diverged: {name} is not finite at step {step}; lower the learning rate or use fp32"
            )


def check_finite_loss(output: StepOutput, *, step: int) -> None:
    """
    Raises:
        ValueError: the loss is not finite; each term's is shown.
    """
    loss = float(output.loss.detach())
    if not math.isfinite(loss):
        values = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in output.terms.items())
        raise ValueError(f"the loss is {loss} at step {step} ({values}); lower the learning rate or use fp32")
