"""Token agreement against a loop over pairs and words, values and gradients, and what must not change it."""

from __future__ import annotations

import functools
from dataclasses import fields, replace

import pytest
import torch
from helpers.support import CNN, VIT, images, plain_agreement, ragged_texts, tiny_model
from torch import Tensor

from loopitr import ImageState, LoopITRModel, TextState
from loopitr.models import agreement as module

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


def some_pairs() -> tuple[Tensor, Tensor]:
    """Pairs in no order, some twice, some not at all, and what each counts in the loss."""
    order = torch.randperm(len(EVERY), generator=torch.Generator().manual_seed(3))[:40]
    pairs = torch.cat([EVERY[order], EVERY[order[:5]]])
    return pairs, torch.randn(len(pairs), generator=torch.Generator().manual_seed(4))


@functools.cache
def by_the_loop(vision: str, style: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits and gradients of the plain loop, computed once for all the ways that are compared with it."""
    model = agreeing_model({"vit": VIT, "cnn": CNN}[vision], style).double().train()
    pairs, weights = some_pairs()
    logits = plain_pairs(model, *states(model), pairs)
    assert logits.std() > 0.1
    return logits.detach().double(), gradients(model, (logits * weights).sum())


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("vision", [pytest.param(VIT, id="vit"), pytest.param(CNN, id="cnn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["at once", "in blocks", "pairs", "pairs in blocks", "pairs, projected"])
def test_every_way_is_the_loop_over_pairs_and_words(monkeypatch, float64, style, vision, way):
    wanted_logits, wanted = by_the_loop("vit" if vision is VIT else "cnn", style)
    model = agreeing_model(vision, style).double().train()
    pairs, weights = some_pairs()
    image_state, text_state = states(model)
    if way.startswith("pairs"):
        if way == "pairs, projected":
            image_state = model.project_images(image_state)
        logits = added(model, image_state, text_state, pairs, block_size=7 if way == "pairs in blocks" else None)
    else:
        if way == "in blocks":
            monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)  # an image at a time
        logits = model.agreement_of_all(image_state, text_state)[tuple(pairs.T)]
    actual = gradients(model, (logits * weights).sum())
    torch.testing.assert_close(logits.double(), wanted_logits, atol=1e-5, rtol=1e-5)  # scores are float32
    assert {f"agreement.{name}" for name, _ in model.agreement.named_parameters()} <= actual.keys()
    for name, expected in wanted.items():
        close = {"atol": 1e-6, "rtol": 1e-5, "msg": lambda m: f"{name}: {m}"}
        torch.testing.assert_close(actual[name], expected, **close)


@torch.no_grad()
def test_all_pairs_and_single_pairs_are_the_same():
    model = agreeing_model().eval()
    image_state, text_state = states(model)
    matrix = model.agreement_of_all(image_state, text_state)
    assert matrix.shape == (IMAGES, TEXTS)
    torch.testing.assert_close(added(model, image_state, text_state, EVERY).view_as(matrix), matrix, atol=1e-5, rtol=0)
    projected = model.agreement_of_all(model.project_images(image_state), text_state)
    assert torch.equal(projected, matrix)
    only_keys = replace(model.project_images(image_state), regions=None)
    torch.testing.assert_close(added(model, only_keys, text_state, EVERY).view_as(matrix), matrix, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_order_and_company_change_nothing():
    """A pair's agreement is its own: not that of its batch, nor of how its batch is laid out."""
    model = agreeing_model().train()
    image_state, text_state = states(model)
    matrix = model.agreement_of_all(image_state, text_state)
    close = {"atol": 1e-5, "rtol": 1e-5}
    noise = torch.randn(TEXTS, 4, text_state.tokens.shape[2])
    padded = TextState(
        text_state.embeds, torch.cat([text_state.tokens, noise], 1), torch.nn.functional.pad(text_state.mask, (0, 4))
    )
    torch.testing.assert_close(model.agreement_of_all(image_state, padded), matrix, **close)
    torch.testing.assert_close(added(model, image_state, padded, EVERY).view_as(matrix), matrix, **close)
    gaps = TextState(text_state.embeds, padded.tokens.flip(1), padded.mask.flip(1))  # words have no order here
    torch.testing.assert_close(model.agreement_of_all(image_state, gaps), matrix, **close)
    images, texts = torch.tensor([2, 0, 1]), torch.randperm(TEXTS, generator=torch.Generator().manual_seed(0))
    moved = model.agreement_of_all(rows_of(image_state, images), rows_of(text_state, texts))
    torch.testing.assert_close(moved, matrix[images][:, texts], **close)
    alone = model.agreement_of_all(rows_of(image_state, torch.tensor([1])), rows_of(text_state, torch.tensor([4])))
    torch.testing.assert_close(alone, matrix[1:2, 4:5], **close)


def rows_of(state: ImageState | TextState, rows: Tensor):
    parts = {field.name: getattr(state, field.name) for field in fields(state)}
    return type(state)(**{name: None if part is None else part[rows] for name, part in parts.items()})


@torch.no_grad()
def test_the_gate_chooses_the_words_that_count():
    """With equal gates the score is the plain mean over words, and with one gate open it is that word's."""
    agreement = agreeing_model().agreement.double()
    regions = agreement.project_regions(torch.randn(1, 5, 32).double())
    tokens, mask = torch.randn(1, 3, 32).double(), torch.ones(1, 3, dtype=torch.bool)
    single = [agreement.all_pairs(regions, tokens[:, [i]], mask[:, :1]).item() for i in range(3)]
    agreement.gate.weight.zero_()
    assert agreement.all_pairs(regions, tokens, mask).item() == pytest.approx(sum(single) / 3)
    agreement.gate.weight.copy_(agreement.score.weight * 1e4)  # the word with the highest score alone
    agreement.gate.bias.copy_(-(1e4 * (sorted(single)[-1] + sorted(single)[-2]) / 2 - 1e4 * agreement.score.bias))
    assert agreement.all_pairs(regions, tokens, mask).item() == pytest.approx(max(single))


@torch.no_grad()
def test_the_scale_is_limited():
    model = agreeing_model().eval()
    image_state, text_state = states(model)
    found = []
    for value in (4.0, 4.7, 9.0):  # exp(4.6) is 100
        model.agreement.logit_scale.fill_(value)
        found.append(model.agreement_of_all(image_state, text_state))
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
    model = agreeing_model().train()
    weights = torch.randn(IMAGES, TEXTS, generator=torch.Generator().manual_seed(4))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            image_state, text_state = states(model)
            matrix = model.agreement_of_all(image_state, text_state)
            pairs = added(model, image_state, text_state, EVERY).view_as(matrix)
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(pairs, matrix, atol=0.05 if enabled else 1e-5, rtol=0)
        found.append((matrix, gradients(model, (matrix * weights).sum())))
    torch.testing.assert_close(found[1][0], found[0][0], atol=0.2 * float(found[0][0].detach().std()), rtol=0)
    flat = [torch.cat([every[name].flatten() for name in found[0][1]]) for _, every in found]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98
    half = model.bfloat16().eval()
    image_state, text_state = half.encode_images(images(IMAGES).bfloat16()), half.encode_texts(*ragged_texts(TEXTS))
    assert half.score_pairs(image_state, text_state, EVERY).score.isfinite().all()


def test_what_cannot_be_compared_is_named():
    model = agreeing_model().eval()
    image_state, text_state = states(model)
    mask = text_state.mask.clone()
    mask[3] = False
    with pytest.raises(ValueError, match="text 3 has no token"):
        model.agreement_of_all(image_state, replace(text_state, mask=mask))
    with pytest.raises(ValueError, match="no token agreement: it was built without model.fusion.agreement"):
        tiny_model().agreement_of_all(image_state, text_state)


def test_frozen_fusion_holds_the_agreement():
    model = agreeing_model().train()
    model.freeze(["fusion"])
    assert not any(p.requires_grad for p in model.agreement.parameters()) and not model.agreement.training
