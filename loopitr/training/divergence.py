"""A model that has diverged is neither validated nor kept."""

from __future__ import annotations

import torch
from torch import nn


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
