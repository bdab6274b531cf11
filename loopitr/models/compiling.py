"""`torch.compile` for the parts of a model that cost time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from loopitr.models.loop_model import LoopITRModel

# One compiled module may have so many graphs. Beyond torch's default of 8 it would silently run uncompiled.
GRAPHS = 32


def compile_in_place(model: LoopITRModel, **options: Any) -> None:
    """Compile both backbones and the fusion encoder; `options` are those of `torch.compile`."""
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.cache_size_limit = max(GRAPHS, torch._dynamo.config.cache_size_limit)
    # In its first run transformers installs hooks, which cannot be traced.
    with torch.no_grad():
        model.encode_texts(torch.zeros(1, 2, dtype=torch.long, device=model.device))
    model.dual.vision.compile(**options)
    model.dual.text.compile(dynamic=True, **options)
    model.fusion.compile(dynamic=True, **options)
