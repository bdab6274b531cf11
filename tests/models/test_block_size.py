"""How many pairs are scored at a time when nobody says: what is held at once stays within the bytes given."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from loopitr import ImageState, LoopITRConfig, LoopITRModel, TextState

WIDTH, TOKENS, LENGTH = 96, 50, 12


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that were alive at once of all that was made within."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            if storage._cdata not in given | self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@pytest.fixture(
    scope="module",
    params=[None, 64, pytest.param(2048, marks=pytest.mark.slow)],
    ids=["", "agreement", "wide agreement"],
)
def model(request) -> LoopITRModel:
    heads = {"num_attention_heads": 6, "num_hidden_layers": 1, "vocab_size": 60}
    config = LoopITRConfig(
        vision={"name": "vit_tiny_patch16_224", "image_size": 32, "kwargs": {"embed_dim": WIDTH, "depth": 1}},
        text={"model_type": "bert", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, **heads},
        fusion={"style": "late", "num_layers": 3, "num_heads": 6, "agreement": request.param},
    )
    torch.manual_seed(0)
    return LoopITRModel(config).eval()


def states(images: int, texts: int) -> tuple[ImageState, TextState]:
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (texts, 1))
    image_state = ImageState(torch.zeros(images, 1), torch.randn(images, TOKENS, WIDTH))
    return image_state, TextState(torch.zeros(texts, 1), torch.randn(texts, LENGTH, WIDTH), mask)


# A case says how many images, texts and captions per image there are, and whether keys and values are there already.
SHAPES = {
    "one image": (1, 500, 500, False),
    "one caption": (200, 1, 1, False),
    "as many images as captions": (100, 100, 2, False),
    "many captions an image": (40, 50, 30, False),
    "one caption, keys and values": (200, 1, 1, True),
    "many captions an image, keys and values": (40, 50, 30, True),
}


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), ("one image", torch.bfloat16)]
)
def test_blocks_by_default_fit_into_the_bytes_given(model, monkeypatch, shape, dtype):
    images, texts, each, projected = SHAPES[shape]
    model.to(dtype)
    image_state, text_state = states(images, texts)
    image_state = ImageState(image_state.embeds, image_state.tokens.to(dtype))
    text_state = TextState(text_state.embeds, text_state.tokens.to(dtype), text_state.mask)
    captions = torch.rand(images, texts).argsort(1)[:, :each]
    pairs = torch.stack([torch.arange(images)[:, None].expand_as(captions), captions], -1).flatten(0, 1)
    room = 2**22
    monkeypatch.setattr("loopitr.models.loop_model.BLOCK_BYTES", room)
    with torch.inference_mode():
        if projected:
            image_state = model.project_images(image_state)
        with LiveBytes() as live:
            model.score_pairs(image_state, text_state, pairs)
    assert live.now == 0
    assert 0.2 * room < live.peak < 1.2 * room  # Small blocks would be safe, and slow.


def test_with_gradient_all_pairs_are_one_block(model, monkeypatch):
    """Their activations are kept anyway."""
    image_state, text_state = states(6, 6)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    score, sizes = model._score_block, []
    monkeypatch.setattr(model.float(), "_score_block", lambda *a: sizes.append(len(a[-1])) or score(*a))
    monkeypatch.setattr("loopitr.models.loop_model.BLOCK_BYTES", 2**16)
    logits = model.score_pairs(image_state, text_state, pairs).logits
    assert sizes == [36]
    with torch.no_grad():
        torch.testing.assert_close(model.score_pairs(image_state, text_state, pairs).logits, logits)
    assert len(sizes) > 2 and sum(sizes) == 72
