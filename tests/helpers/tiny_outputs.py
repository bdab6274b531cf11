"""Models whose saved form is easy to get wrong, and all that comes out of one."""

from __future__ import annotations

from typing import Any

import torch
from helpers.support import CNN, VIT, images, ragged_texts
from torch import Tensor, nn

from loopitr import LoopITRModel

SWIN: dict[str, Any] = {  # Its window indices and masks are in no checkpoint.
    "name": "swin_tiny_patch4_window7_224",
    "image_size": 32,
    "kwargs": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
}
VISION = {"vit": VIT, "cnn": CNN, "swin": SWIN}
PAIRS = torch.tensor([[0, 1], [2, 0], [1, 4], [2, 3]])


@torch.no_grad()
def outputs(model: LoopITRModel) -> list[Tensor]:
    image_state = model.encode_images(images(3, model.dual.vision.image_size))
    text_state = model.encode_texts(*ragged_texts(5))
    scores = model.score_pairs(image_state, text_state, PAIRS).logits
    return [image_state.embeds, image_state.tokens, text_state.embeds, text_state.tokens, scores]


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(a, kind)()), dict(getattr(b, kind)())
        assert ours.keys() == theirs.keys()
        assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
