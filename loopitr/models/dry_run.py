"""A forward pass that only finds out which modules of a network are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def dry_run(model: nn.Module) -> Iterator[set[nn.Module]]:
    """A context in which `model` is in eval mode, without gradient; its value is the set of modules called so far.

    Afterwards the model is back in its former mode, and the hooks are removed.
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
