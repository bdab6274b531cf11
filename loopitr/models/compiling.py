"""`torch.compile` for the expensive parts of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from loopitr.models.loop_model import LoopITRModel

# The most graphs of one compiled module. Beyond the limit, which is 8 by default, torch silently runs it uncompiled.
GRAPHS = 32


def compile_in_place(model: LoopITRModel, **options: Any) -> None:
    """Compile both backbones and the fusion encoder; `options` are those of `torch.compile`."""
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.cache_size_limit = max(GRAPHS, torch._dynamo.config.cache_size_limit)
    # transformers installs hooks in its first forward pass, which cannot be traced.
    with torch.no_grad():
        model.encode_texts(torch.zeros(1, 2, dtype=torch.long, device=model.device))
    model.dual.vision.compile(**options)
    model.dual.text.compile(dynamic=True, **options)
    model.fusion.compile(dynamic=True, **options)
