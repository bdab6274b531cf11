"""Token agreement against a loop over pairs and words, values and gradients, and what must not change it."""

from __future__ import annotations

import pytest
import torch
from helpers.support import CNN, VIT, images, ragged_texts, tiny_model
from torch import Tensor

from loopitr import ImageState, LoopITRModel, TextState
from loopitr.models import agreement as module
from loopitr.models.agreement import TokenAgreement

WIDTH = 12
IMAGES, TEXTS = 3, 18
EVERY = torch.cartesian_prod(torch.arange(IMAGES), torch.arange(TEXTS))


def agreeing_model(*args, **kwargs) -> LoopITRModel:
    """A tiny model whose agreement tells pairs apart."""
    model = tiny_model(*args, fusion={"agreement": WIDTH}, **kwargs)
    assert model.agreement is not None
    with torch.no_grad():
        model.agreement.score.weight.mul_(30)
        model.agreement.gate.weight.mul_(30)
    return model


def states(model: LoopITRModel) -> tuple[ImageState, TextState]:
    """As many captions as make several buckets."""
    pixels = images(IMAGES, model.dual.vision.image_size)
    return model.encode_images(pixels), model.encode_texts(*ragged_texts(TEXTS))


def plain_agreement(agreement: TokenAgreement, image: Tensor, words: Tensor) -> Tensor:
    """One pair, word by word: `image [N, Dv]`, `words [L, D]` without padding -> a scalar."""
    regions = [agreement.region(token) for token in image]
    regions = [region / region.norm() for region in regions]
    total, weighted = torch.zeros(()), torch.zeros(())
    for token in words:
        word = agreement.word(token)
        word = word / word.norm()
        exponentials = [(agreement.logit_scale.exp() * (word * region).sum()).exp() for region in regions]
        attended = sum(e * region for e, region in zip(exponentials, regions, strict=True)) / sum(exponentials)
        difference = agreement.difference((word - attended) ** 2)
        centred = difference - difference.mean()
        normed = centred / (centred.square().mean() + 1e-12).sqrt() * agreement.norm.weight + agreement.norm.bias
        gate = 1 / (1 + (-agreement.gate(normed)).exp())
        total, weighted = total + gate, weighted + gate * agreement.score(normed)
    return (weighted / total).squeeze()


def plain_pairs(model: LoopITRModel, image_state: ImageState, text_state: TextState, pairs: Tensor) -> Tensor:
    rows = []
    for image, text in pairs.tolist():
        words = text_state.tokens[text][text_state.mask[text]]
        rows.append(plain_agreement(model.agreement, image_state.tokens[image], words))
    return torch.stack(rows)


def added(model: LoopITRModel, image_state: ImageState, text_state: TextState, pairs: Tensor, **options) -> Tensor:
    """What agreement adds to the match scores of `pairs`."""
    whole = model.score_pairs(image_state, text_state, pairs, **options)
    agreement, model.agreement = model.agreement, None
    without = model.score_pairs(image_state, text_state, pairs, **options)
    model.agreement = agreement
    assert torch.equal(whole.logits[:, 0], without.logits[:, 0])
    return whole.score - without.score


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(model: LoopITRModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("vision", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("way", ["at once", "in blocks", "pairs", "pairs in blocks", "pairs, projected"])
def test_every_way_is_the_loop_over_pairs_and_words(monkeypatch, float64, style, vision, way):
    model = agreeing_model(vision, style).double().train()
    order = torch.randperm(len(EVERY), generator=torch.Generator().manual_seed(3))[:40]
    pairs = torch.cat([EVERY[order], EVERY[order[:5]]])  # in no order, some twice, some not at all
    weights = torch.randn(len(pairs), generator=torch.Generator().manual_seed(4))
    found = []
    for fast in (True, False):
        image_state, text_state = states(model)
        if not fast:
            logits = plain_pairs(model, image_state, text_state, pairs)
        elif way.startswith("pairs"):
            if way == "pairs, projected":
                image_state = model.project_images(image_state)
            logits = added(model, image_state, text_state, pairs, block_size=7 if way == "pairs in blocks" else None)
        else:
            if way == "in blocks":
                monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)  # an image at a time
            logits = model.agreement_of_all(image_state, text_state)[tuple(pairs.T)]
        found.append((logits.double(), gradients(model, (logits * weights).sum())))
    assert found[1][0].std() > 0.1
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)  # scores are float32
    assert {f"agreement.{name}" for name, _ in model.agreement.named_parameters()} <= found[0][1].keys()
    for name, expected in found[1][1].items():
        close = {"atol": 1e-6, "rtol": 1e-5, "msg": lambda m: f"{name}: {m}"}
        torch.testing.assert_close(found[0][1][name], expected, **close)
