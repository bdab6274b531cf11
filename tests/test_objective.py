"""The training step: against itself written out in loops, and what it must never do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from step_reference import EveryThirdWord, is_positive, reference_mlm, reference_step, step_batch
from support import CNN, VIT, tiny_model

from loopitr.masking import TokenMasking
from loopitr.objective import DISTILLATION, LoopObjective, ObjectiveOptions


def step(model=None, batch=None, *, token_masking=None, scale=1.0, **options):
    objective = LoopObjective(model or tiny_model().train(), ObjectiveOptions(**options), token_masking=token_masking)
    return objective(**(batch or step_batch()), distillation_scale=scale)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, rtol=1e-3):
    largest = max(float(g.abs().max()) for g in expected.values())
    for name in expected.keys() | got.keys():
        a, b = (grads.get(name, torch.zeros(())) for grads in (got, expected))
        atol = rtol * 1e-2 * largest
        torch.testing.assert_close(a, b.expand_as(a), atol=atol, rtol=rtol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize(
    "style, layers, options",
    [
        ("late", 2, {"distillation_loss": "kl", "num_negatives": 3, "teacher_temperature": 0.5}),
        ("late", 1, {"distillation_loss": "cprd", "num_negatives": 4}),
        ("shared", 2, {"distillation_loss": "cprd", "num_negatives": 3, "hard_rule": "top", "hard_top": 2}),
        ("shared", 1, {"distillation_loss": "kl", "num_negatives": 12}),  # more than there are
        ("late", 1, {"num_negatives": 12, "hard_rule": "threshold", "hard_threshold": 0.45}),
    ],
)
def test_the_step_is_the_one_written_out_in_loops(style, layers, options):
    options = ObjectiveOptions(**options, itc=0.7, itm=1.3, distillation=2.0)
    model, batch = tiny_model(style=style, layers=layers).train(), step_batch()
    # Scores spread out, so that the hard rules have something to choose from.
    with torch.no_grad():
        model.itm_head.weight.mul_(30)
    out = LoopObjective(model, options)(**batch)
    expected = reference_step(model, batch, options)
    for name in ("itc", "itm", "distillation"):
        torch.testing.assert_close(out.terms[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")
        assert out.terms[name] > 0
    torch.testing.assert_close(out.metrics["valid_length"], expected["valid_length"])
    total = 0.7 * expected["itc"] + 1.3 * expected["itm"] + 2.0 * expected["distillation"]
    torch.testing.assert_close(out.loss, total, atol=1e-5, rtol=1e-4)
    assert_same_gradients(gradients(model, out.loss), gradients(model, total))


def test_itc_is_plain_cross_entropy_when_identities_differ():
    model, batch = tiny_model().train(), step_batch(list(range(6)), list(range(6)))
    loss = step(model, batch, itm=0, distillation=0).loss
    logits = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).logits_per_image
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(loss, expected)


# Positives and negatives


def test_positives_reach_over_twins_in_both_directions():
    batch = step_batch()
    positives = LoopObjective(tiny_model())._positives(batch["identities"], batch["caption_ids"])
    expected = torch.tensor([[is_positive(batch, i, j) for j in range(8)] for i in range(8)])
    assert torch.equal(positives.per_image, expected) and torch.equal(positives.per_text, expected.T)
    assert not torch.equal(expected, expected.T)
    # Rows 0, 3 and 7 show image 0; its captions are texts 0, 3 and 7, and text 2, which says the same as 7.
    assert expected[0].nonzero().flatten().tolist() == [0, 2, 3, 7]
    # Image 2 has only the shared caption, not the others of image 0.
    assert expected[2].nonzero().flatten().tolist() == [2, 7]
    assert expected[:, 2].nonzero().flatten().tolist() == [0, 2, 3, 7]


@pytest.mark.parametrize("mining", ["topk", "sample", "stratified"])
@pytest.mark.parametrize("count", [2, 5, 20])
def test_no_positive_and_no_twin_is_a_negative(mining, count, monkeypatch):
    model, batch = tiny_model().train(), step_batch()
    objective = LoopObjective(model, ObjectiveOptions(mining=mining, num_negatives=count, mining_pool=count))
    calls = []

    def spy(similarity, positives, own, groups):
        candidates = type(objective)._candidates(objective, similarity, positives, own, groups)
        calls.append((candidates, groups))
        return candidates

    monkeypatch.setattr(objective, "_candidates", spy)
    objective(**batch)
    (to_text, captions), (to_image, identities) = calls
    for query in range(8):
        for found, groups, side in ((to_text, captions, 0), (to_image, identities, 1)):
            assert found.indices[query, 0] == query and found.valid[query, 0]
            negatives = found.indices[query, 1:][found.valid[query, 1:]].tolist()
            pairs = [(query, j) if side == 0 else (j, query) for j in negatives]
            assert not any(is_positive(batch, i, j) for i, j in pairs)
            assert len({int(groups[j]) for j in negatives}) == len(negatives)
            possible = {
                int(groups[j]) for j in range(8) if not is_positive(batch, *((query, j) if side == 0 else (j, query)))
            }
            assert len(negatives) == min(count, len(possible))
            assert (found.indices[query][~found.valid[query]] == query).all()  # masked: the own pair, scored anyway


@pytest.mark.parametrize("loss", ["kl", "cprd"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_of_one_identity(loss, size):
    """Nothing to mine: the positives are still matched, and distillation is zero; all of it finite."""
    model, batch = tiny_model().train(), step_batch([0] * size, list(range(size)))
    out = step(model, batch, distillation_loss=loss)
    assert out.terms["distillation"] == 0 and out.terms["itm"] > 0
    assert all(torch.isfinite(value) for value in (out.loss, *out.terms.values(), *out.metrics.values()))
    if size == 1:
        torch.testing.assert_close(out.terms["itc"], torch.tensor(0.0))
    assert all(torch.isfinite(g).all() for g in gradients(model, out.loss).values())


def test_a_batch_of_one_caption():
    out = step(batch=step_batch([0, 1, 2], [0, 0, 0]))
    out.loss.backward()
    assert out.terms["distillation"] == 0 and torch.isfinite(out.loss)


def test_more_negatives_than_the_batch_has_are_masked():
    batch = step_batch(list(range(4)), list(range(4)))
    few, many = (step(tiny_model().train(), batch, num_negatives=k) for k in (3, 50))
    for name in few.terms:
        torch.testing.assert_close(few.terms[name], many.terms[name])
    assert few.metrics["valid_length"] == many.metrics["valid_length"]


def test_the_order_of_the_batch_and_its_padding_change_nothing():
    batch = step_batch()
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    moved = {key: value[order] for key, value in batch.items()}
    for key in ("input_ids", "attention_mask"):
        moved[key] = F.pad(moved[key], (0, 4))
    model = tiny_model().train()
    outputs = [step(model, b, distillation_loss="kl") for b in (batch, moved)]
    for name in outputs[0].terms:
        torch.testing.assert_close(outputs[0].terms[name], outputs[1].terms[name], atol=1e-5, rtol=1e-4)
    assert_same_gradients(*(gradients(model, output.loss) for output in outputs))


# Who learns from what


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("vision", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("mlm", [0.0, 1.0])
def test_every_parameter_gets_a_gradient(style, vision, mlm):
    if vision is CNN:  # timm starts the last norm of a block at zero, which blocks the first gradient of the rest
        vision = {**CNN, "kwargs": {**CNN["kwargs"], "zero_init_last": False}}
    model = tiny_model(vision, style, mlm_head=bool(mlm)).train()
    batch = step_batch(size=vision["image_size"])
    found = gradients(model, step(model, batch, mlm=mlm, token_masking=EveryThirdWord()).loss)
    assert {name for name, _ in model.named_parameters()} == set(found)
    # The biases of keys move all logits of a softmax alike: zero but for rounding.
    dead = [n for n, g in found.items() if not g.any() and not n.endswith("key.bias")]
    assert not dead


@pytest.mark.parametrize("loss", list(DISTILLATION))
def test_every_distillation_loss_teaches_the_dual_and_not_the_teacher(loss):
    model = tiny_model(style="late").train()
    out = step(model, itc=0, itm=0, distillation_loss=loss)
    assert list(out.terms) == ["distillation"] and torch.isfinite(out.loss) and out.loss > 0
    found = gradients(model, out.loss)
    assert not [name for name in found if name.startswith(("fusion", "itm_head"))]
    assert set(found) == {name for name, _ in model.dual.named_parameters(prefix="dual")}
    assert all(gradient.any() for name, gradient in found.items() if not name.endswith("key.bias"))


@pytest.mark.parametrize("style", ["late", "shared"])
def test_distillation_adds_nothing_to_the_fusion_heads_gradient(style):
    model = tiny_model(style=style).train()
    with_it, without = (gradients(model, step(model, distillation=w).loss) for w in (1.0, 0.0))
    for name in with_it:
        if name.startswith(("fusion", "itm_head")):
            assert torch.equal(with_it[name], without[name])
    assert not torch.equal(with_it["dual.vision_projection.weight"], without["dual.vision_projection.weight"])


def test_itm_needs_no_distillation_and_itc_needs_neither():
    out = step(distillation=0)
    assert set(out.terms) == {"itc", "itm"} and set(out.metrics) == {"temperature", "itm_accuracy", "rank_agreement"}
    out = step(distillation=0, itm=0)
    assert set(out.terms) == {"itc"} and set(out.metrics) == {"temperature"}
    out = step(itc=0, itm=0, distillation=0)
    assert out.terms == {} and out.loss == 0 and out.loss.requires_grad


def test_distillation_scale_is_a_factor_on_that_term_alone():
    model = tiny_model().train()
    losses = [step(model, scale=s, distillation=2.0) for s in (0.0, 0.25, 1.0)]
    assert len({out.terms["distillation"].item() for out in losses}) == 1
    rest = losses[0].terms["itc"] + losses[0].terms["itm"]
    for scale, out in zip((0.0, 0.25, 1.0), losses):
        torch.testing.assert_close(out.loss, rest + 2.0 * scale * out.terms["distillation"])


def test_metrics():
    model = tiny_model().train()
    with torch.no_grad():
        model.itm_head.weight.zero_()
        model.itm_head.bias.copy_(torch.tensor([0.0, 1.0]))  # everything is a match
    out = step(model, num_negatives=2)
    torch.testing.assert_close(out.metrics["temperature"], 1 / model.dual.scale.detach())
    torch.testing.assert_close(out.metrics["itm_accuracy"], torch.tensor(8 / (8 + 2 * 8 * 2)))
    assert out.metrics["rank_agreement"] == 0 and out.metrics["valid_length"] == 0  # the teacher ties all
    assert not any(value.requires_grad for value in out.metrics.values())


# How it runs


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("mlm", [0.0, 1.0])
def test_backbones_run_once(style, mlm):
    model = tiny_model(style=style, mlm_head=bool(mlm)).train()
    runs = []
    watched = {
        "vision": model.dual.vision,
        "block": model.dual.vision.model.blocks[0],
        "text": model.dual.text.model,
        "layer": model.dual.text.model.encoder.layer[0],
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda module, args, output, name=name: runs.append(name))
    step(model, mlm=mlm, token_masking=EveryThirdWord()).loss.backward()
    assert sorted(runs) == sorted(watched)


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
    options = {"mlm": 1.0, "token_masking": EveryThirdWord(), "distillation_loss": "kl", "num_negatives": 12}
    exact = step(model, **options)
    expected = gradients(model, exact.loss)
    with torch.autocast("cpu", torch.bfloat16):
        out = step(model, **options)
    assert out.loss.dtype == torch.float32
    for name in exact.terms:
        close = {"atol": 0.03, "rtol": 0.03, "msg": lambda m: f"{name}: {m}"}
        torch.testing.assert_close(out.terms[name], exact.terms[name], **close)
    found = gradients(model, out.loss)
    assert all(torch.isfinite(g).all() for g in found.values())
    flat = [torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99


# Masked language modelling


@pytest.mark.parametrize("style", ["late", "shared"])
def test_mlm_is_the_one_written_out_token_by_token(style):
    model, batch, masking = tiny_model(style=style, mlm_head=True).train(), step_batch(), EveryThirdWord()
    out = step(model, batch, itc=0, itm=0, distillation=0, mlm=0.5, token_masking=masking)
    expected = reference_mlm(model, batch, *masking(batch["input_ids"], batch["attention_mask"]))
    torch.testing.assert_close(out.terms["mlm"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, 0.5 * expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(model, out.loss), gradients(model, 0.5 * expected))


def test_mlm_leaves_the_other_terms_alone_and_survives_a_batch_without_masks():
    model = tiny_model(mlm_head=True).train()
    plain, masked = step(model), step(model, mlm=1.0, token_masking=EveryThirdWord())
    for name in plain.terms:
        torch.testing.assert_close(masked.terms[name], plain.terms[name], atol=1e-6, rtol=1e-5)
    nothing = TokenMasking(mask_token_id=4, vocab_size=60, special_ids=(0,), probability=0.0)
    out = step(model, mlm=1.0, token_masking=nothing)
    assert out.terms["mlm"] == 0
    assert all(torch.isfinite(g).all() for g in gradients(model, out.loss).values())


def test_mlm_needs_a_head_and_a_mask_token():
    for model, masking in ((tiny_model(), EveryThirdWord()), (tiny_model(mlm_head=True), None)):
        with pytest.raises(ValueError, match="objective.mlm needs a model with an mlm_head and a tokenizer"):
            LoopObjective(model, ObjectiveOptions(mlm=1.0), token_masking=masking)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distillation_loss": "hinge"}, "unknown distillation_loss 'hinge'; known: kl, cprd"),
        ({"mining": "random"}, "unknown mining 'random'; known: topk, sample, stratified"),
        ({"hard_rule": "median"}, "unknown hard_rule 'median'; known: threshold, mean, top"),
        ({"num_negatives": 0}, "objective.num_negatives must be at least 1, got 0"),
        ({"itc": -1.0}, "objective.itc must be a weight >= 0, got -1.0"),
        ({"distillation": float("nan")}, "objective.distillation must be a weight >= 0, got nan"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveOptions(**options)
