"""A run of a network whose outputs are thrown away, to see what it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def dry_run(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Within it `model` is in eval mode and there is no gradient; the set fills with the modules that are called.

    Afterwards the model is back in its former mode, without a hook.
    """
    called: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda m, *_: called.add(m)) for module in model.modules()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield called
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
