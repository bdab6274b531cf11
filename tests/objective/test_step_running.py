"""The training step: how often it runs what, in which precision, and its masked language modelling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.step_reference import (
    EveryThirdWord,
    assert_same_gradients,
    gradients,
    model_of,
    reference_mlm,
    step,
    step_batch,
)
from helpers.support import tiny_model
from torch.overrides import TorchFunctionMode

from loopitr.objective.build import build_objective
from loopitr.objective.options import ObjectiveOptions
from loopitr.objective.word_masking import TokenMasking


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("mlm", [0.0, 1.0])
def test_backbones_see_every_row_once(style, mlm):
    """Captions may go in several buckets; for MLM their masked copies go too."""
    model = tiny_model(style=style, mlm_head=bool(mlm)).train()
    watched = {
        "vision": model.dual.vision,
        "block": model.dual.vision.model.blocks[0],
        "text": model.dual.text.model,
        "layer": model.dual.text.model.encoder.layer[0],
    }
    rows = dict.fromkeys(watched, 0)

    def count(name, output):
        rows[name] += len(output if isinstance(output, torch.Tensor) else output[0])

    for name, module in watched.items():
        module.register_forward_hook(lambda module, args, output, name=name: count(name, output))
    step(model, mlm=mlm, masking=EveryThirdWord()).loss.backward()
    captions = 16 if mlm else 8
    assert rows == {"vision": 8, "block": 8, "text": captions, "layer": captions}


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("mlm", [0.0, 1.0])
def test_every_pair_is_scored_once_for_matching_and_teaching(style, mlm):
    """All 8 x 8 pairs, asked for from both sides: the teacher's scores are the ITM head's, without another pass."""
    model, batch = tiny_model(style=style, mlm_head=bool(mlm)).train(), step_batch(list(range(8)), list(range(8)))
    scored, projected = [], [0] * len(model.fusion.cross)
    model.itm_head.register_forward_hook(lambda module, args, output: scored.append(len(output)))

    def count(index, images):
        projected[index] += len(images)

    for index, cross in enumerate(model.fusion.cross):
        cross.key.register_forward_hook(lambda module, args, output, index=index: count(index, args[0]))
    out = step(model, batch, num_negatives=7, mlm=mlm, masking=EveryThirdWord(), distillation_loss="kl")
    out.loss.backward()
    assert out.terms.keys() == {"itc", "itm", "distillation", *(["mlm"] if mlm else [])}
    assert scored == [64]
    assert max(projected) == 8  # These are images; a layer that takes the tokens as they are projects none.


@pytest.mark.parametrize("options", [{"mlm": 1.0}, {"itm_negatives": 1}, {"mlm": 1.0, "itm_negatives": 1}])
def test_keys_and_values_of_two_uses_are_projected_once(monkeypatch, options):
    """Unless pairs come in blocks, to save memory: then each block projects what it needs."""
    model, projected = tiny_model(mlm_head=True).train(), []
    project = model.fusion.project
    monkeypatch.setattr(model.fusion, "project", lambda tokens: projected.append(len(tokens)) or project(tokens))
    for block, expected in ((None, [8]), (5, [])):
        projected.clear()
        chosen = ObjectiveOptions(num_negatives=4, **options)
        build_objective(model, chosen, masking=EveryThirdWord(), pair_block=block)(**step_batch())
        assert projected == expected


def test_image_tokens_serve_as_well_as_pixels():
    model, batch = tiny_model().train(), step_batch()
    with_pixels = step(model, batch)
    pixels = batch.pop("pixel_values")
    with_tokens = step(model, {**batch, "image_tokens": model.dual.vision(pixels)})
    assert torch.equal(with_pixels.loss, with_tokens.loss)
    with pytest.raises(ValueError, match="needs pixel_values or image_tokens"):
        step(model, batch)


@pytest.mark.parametrize("style", ["late", "shared"])
def test_gradient_checkpointing_changes_nothing(style):
    results = []
    for enable in (False, True):
        model = tiny_model(style=style).train()
        if enable:
            model.gradient_checkpointing_enable()
            assert model.fusion.gradient_checkpointing and model.dual.vision.model.grad_checkpointing
            assert model.dual.text.model.encoder.layer[0].gradient_checkpointing
        out = step(model)
        results.append((out.loss, gradients(model, out.loss)))
        if enable:
            model.gradient_checkpointing_disable()
            assert not model.fusion.gradient_checkpointing and not model.dual.vision.model.grad_checkpointing
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same_gradients(results[1][1], results[0][1], rtol=1e-4)


@pytest.mark.parametrize("style", ["late", "shared"])
def test_bfloat16_is_close_to_float32(style):
    model = tiny_model(style=style, mlm_head=True).train()
    options = {"mlm": 1.0, "masking": EveryThirdWord(), "distillation_loss": "kl", "num_negatives": 12}
    exact = step(model, **options)
    expected = gradients(model, exact.loss)
    with torch.autocast("cpu", torch.bfloat16):
        out = step(model, **options)
    assert out.loss.dtype == torch.float32
    for name in exact.terms:
        close = {"atol": 0.03, "rtol": 0.03, "msg": lambda m: f"{name}: {m}"}
        torch.testing.assert_close(out.terms[name], exact.terms[name], **close)
    actual = gradients(model, out.loss)
    assert all(torch.isfinite(g).all() for g in actual.values())
    flat = [torch.cat([grads[name].flatten() for name in expected]) for grads in (actual, expected)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99


class OldAutocast(TorchFunctionMode):
    """Keeps the weights of linear layers as torch's autocast before issue 112583 did: as first used, with gradient or
    without. It casts to float32, so that nothing else changes."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *rest = args
            if isinstance(weight, torch.nn.Parameter):
                weight = self.casts.setdefault(id(weight), weight * 1)
            args = (x, weight, *rest)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"num_negatives": 4, "itm_negatives": 1},
        {"itm": 0.0, "mlm": 1.0},
        {"itm": 0.0, "agreement": 1.0},
    ],
    ids=["some only teach", "words", "agreement"],
)
def test_scores_without_gradient_leave_no_weights_in_autocasts_cache(monkeypatch, options):
    chosen = ObjectiveOptions(**{"itc": 0.0, "distillation": 1.0, "distillation_loss": "kl", **options})
    model = model_of(chosen)
    objective = build_objective(model, chosen, masking=EveryThirdWord())
    expected = gradients(model, objective(**step_batch()).loss)
    with torch.autocast("cpu", enabled=False), OldAutocast() as old:  # Only the outermost autocast empties the cache.
        monkeypatch.setattr(torch, "clear_autocast_cache", old.casts.clear)
        loss = objective(**step_batch()).loss
    assert_same_gradients(gradients(model, loss), expected)


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("ids", [None, list(range(8))])
def test_negatives_that_only_teach(style, ids):
    """The matching losses are those of fewer negatives, the distillation that of all."""
    model, batch = tiny_model(style=style).train(), step_batch() if ids is None else step_batch(ids, ids)
    with torch.no_grad():
        model.itm_head.weight.mul_(30)  # This spreads the match scores out.
    out = step(model, batch, num_negatives=4, itm_negatives=1, lce=0.5)
    few = step(model, batch, num_negatives=1, lce=0.5, itc=0, distillation=0)
    many = step(model, batch, num_negatives=4, itm=0)
    for name, other in (("itm", few), ("lce", few), ("itc", many), ("distillation", many)):
        torch.testing.assert_close(out.terms[name], other.terms[name], atol=1e-6, rtol=1e-5)
    for name in ("valid_length", "rank_agreement"):
        torch.testing.assert_close(out.metrics[name], many.metrics[name])
    actual, part, rest = gradients(model, out.loss), gradients(model, few.loss), gradients(model, many.loss)
    assert_same_gradients(actual, {name: part.get(name, 0) + rest.get(name, 0) for name in part.keys() | rest.keys()})


@pytest.mark.parametrize("count", [0, 5])
def test_negatives_to_train_on_are_some_of_those_mined(count):
    with pytest.raises(ValueError, match=f"objective.itm_negatives must be from 1 to num_negatives 4, got {count}"):
        ObjectiveOptions(num_negatives=4, itm_negatives=count)


# Masked language modelling


@pytest.mark.parametrize("style", ["late", "shared"])
def test_mlm_is_the_one_written_out_token_by_token(style):
    model, batch, masking = tiny_model(style=style, mlm_head=True).train(), step_batch(), EveryThirdWord()
    out = step(model, batch, itc=0, itm=0, distillation=0, mlm=0.5, masking=masking)
    expected = reference_mlm(model, batch, *masking(batch["input_ids"], batch["attention_mask"]))
    torch.testing.assert_close(out.terms["mlm"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, 0.5 * expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(model, out.loss), gradients(model, 0.5 * expected))


def test_mlm_leaves_the_other_terms_alone_and_survives_a_batch_without_masks():
    model = tiny_model(mlm_head=True).train()
    plain, masked = step(model), step(model, mlm=1.0, masking=EveryThirdWord())
    for name in plain.terms:
        torch.testing.assert_close(masked.terms[name], plain.terms[name], atol=1e-6, rtol=1e-5)
    nothing = TokenMasking(mask_token_id=4, vocab_size=60, special_ids=tuple(range(60)))
    out = step(model, mlm=1.0, masking=nothing)
    assert out.terms["mlm"] == 0
    assert all(torch.isfinite(g).all() for g in gradients(model, out.loss).values())


def test_mlm_needs_a_head_and_a_mask_token():
    for model, masking in ((tiny_model(), EveryThirdWord()), (tiny_model(mlm_head=True), None)):
        with pytest.raises(ValueError, match="objective.mlm needs a model with an mlm_head and a tokenizer"):
            build_objective(model, ObjectiveOptions(mlm=1.0), masking=masking)
