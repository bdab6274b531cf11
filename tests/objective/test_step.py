"""The training step: against itself written out in loops, and what it must never do."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from helpers.step_reference import (
    EveryThirdWord,
    assert_same_gradients,
    gradients,
    is_positive,
    reference_step,
    step,
    step_batch,
)
from helpers.support import CNN, VIT, tiny_model

from loopitr.objective.build import build_objective
from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.losses import kendall_tau
from loopitr.objective.options import DistillationName, ObjectiveOptions
from loopitr.objective.step import Step


@pytest.mark.parametrize(
    "style, layers, options",
    [
        ("late", 2, {"distillation_loss": "kl", "num_negatives": 3, "teacher_temperature": 0.5}),
        ("late", 1, {"distillation_loss": "cprd", "num_negatives": 4}),
        ("shared", 2, {"distillation_loss": "cprd", "num_negatives": 3, "hard_rule": "top", "hard_top": 2}),
        ("shared", 1, {"distillation_loss": "kl", "num_negatives": 12}),  # These are more than there are.
        ("late", 1, {"num_negatives": 12, "hard_rule": "threshold", "hard_threshold": 0.45}),
        ("late", 1, {"num_negatives": 4, "balance_itm": False}),
        ("shared", 1, {"num_negatives": 12, "balance_itm": False, "distillation_loss": "kl"}),
    ],
)
def test_the_step_is_the_one_written_out_in_loops(style, layers, options):
    options = ObjectiveOptions(**options, itc=0.7, itm=1.3, lce=0.6, distillation=2.0)
    model, batch = tiny_model(style=style, layers=layers).train(), step_batch()
    # Scores spread out, so that the hard rules have something to choose from.
    with torch.no_grad():
        model.itm_head.weight.mul_(30)
    out = build_objective(model, options)(**batch)
    expected = reference_step(model, batch, options)
    for name in ("itc", "itm", "lce", "distillation"):
        torch.testing.assert_close(out.terms[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")
        assert out.terms[name] > 0
    torch.testing.assert_close(out.metrics["valid_length"], expected["valid_length"])
    total = 0.7 * expected["itc"] + 1.3 * expected["itm"] + 0.6 * expected["lce"] + 2.0 * expected["distillation"]
    torch.testing.assert_close(out.loss, total, atol=1e-5, rtol=1e-4)
    assert_same_gradients(gradients(model, out.loss), gradients(model, total))


def test_a_head_that_always_says_no_pays_more_when_matching_is_balanced():
    model = tiny_model().train()
    with torch.no_grad():
        model.itm_head.weight.zero_()
        model.itm_head.bias.copy_(torch.tensor([1.0, 0.0]))  # The head says no to everything.
    right, wrong = (F.softplus(torch.tensor(x)) for x in (-1.0, 1.0))
    plain, balanced = (step(model, num_negatives=2, balance_itm=b).terms["itm"] for b in (False, True))
    torch.testing.assert_close(balanced, (right + wrong) / 2)
    torch.testing.assert_close(plain, (8 * wrong + 2 * 8 * 2 * right) / (8 + 2 * 8 * 2))


def test_itc_is_plain_cross_entropy_when_identities_differ():
    model, batch = tiny_model().train(), step_batch(list(range(6)), list(range(6)))
    loss = step(model, batch, itm=0, distillation=0).loss
    logits = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).logits_per_image
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("itc", [0.0, 1.0])
def test_the_sigmoid_loss_is_the_one_written_out_over_pairs(itc):
    """Every pair by itself, right or not by identity; the bias is trained, and moves no other term."""
    model, batch = tiny_model(initial_logit_bias=-2.0).train(), step_batch()
    out = step(model, batch, itc=itc, itc_loss="sigmoid", distillation_loss="kl")
    actual = gradients(model, out.loss)
    assert bool(actual["dual.logit_bias"]) == bool(itc)
    plain = step(model, batch, distillation_loss="kl")
    for name in ("itm", "distillation"):
        assert torch.equal(out.terms[name], plain.terms[name])
    assert gradients(model, plain.loss)["dual.logit_bias"] == 0  # DDP wants one
    if not itc:
        return
    logits = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).logits_per_image
    expected = 0
    for i in range(8):
        for j in range(8):
            expected = expected + F.softplus(-logits[i, j] if is_positive(batch, i, j) else logits[i, j]) / 8
    torch.testing.assert_close(out.terms["itc"], expected)


def test_the_sigmoid_loss_needs_its_bias():
    with pytest.raises(ValueError, match="itc_loss 'sigmoid' needs a model with a logit_bias"):
        step(tiny_model(), itc_loss="sigmoid")
    step(tiny_model(), itc=0, itc_loss="sigmoid")


# Positives and negatives


def encoded_step(objective: LoopObjective, batch: dict[str, torch.Tensor]) -> Step:
    ids = {name: batch[name] for name in ("identities", "caption_ids")}
    inputs = {name: value for name, value in batch.items() if name not in ids}
    return Step(objective, objective.encode(**inputs), **ids)


def test_positives_reach_over_twins_in_both_directions():
    batch = step_batch()
    positives = encoded_step(build_objective(tiny_model()), batch).positives
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
def test_no_positive_and_no_twin_is_a_negative(mining, count):
    model, batch = tiny_model().train(), step_batch()
    objective = build_objective(model, ObjectiveOptions(mining=mining, num_negatives=count, mining_pool=count))
    candidates = encoded_step(objective, batch).candidates
    assert (candidates.pairs[0, ..., 0] == torch.arange(8)[:, None]).all()  # Images ask for texts.
    assert (candidates.pairs[1, ..., 1] == torch.arange(8)[:, None]).all()  # Texts ask for images.
    for query in range(8):
        for side, groups in ((0, batch["caption_ids"]), (1, batch["identities"])):
            indices, valid = candidates.pairs[side, query, :, 1 - side], candidates.valid[side, query]
            assert indices[0] == query and valid[0]
            negatives = indices[1:][valid[1:]].tolist()
            pairs = [(query, j) if side == 0 else (j, query) for j in negatives]
            assert not any(is_positive(batch, i, j) for i, j in pairs)
            assert len({int(groups[j]) for j in negatives}) == len(negatives)
            possible = {
                int(groups[j]) for j in range(8) if not is_positive(batch, *((query, j) if side == 0 else (j, query)))
            }
            assert len(negatives) == min(count, len(possible))
            assert (indices[~valid] == query).all()  # A masked slot repeats the own pair, which is scored anyway.


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
    actual = gradients(model, step(model, batch, mlm=mlm, masking=EveryThirdWord()).loss)
    assert {name for name, _ in model.named_parameters()} == set(actual)
    # The biases of keys move all logits of a softmax alike: zero but for rounding.
    dead = [n for n, g in actual.items() if not g.any() and not n.endswith("key.bias")]
    assert not dead


@pytest.mark.parametrize("loss", get_args(DistillationName))
def test_every_distillation_loss_teaches_the_dual_and_not_the_teacher(loss):
    model = tiny_model(style="late").train()
    out = step(model, itc=0, itm=0, distillation_loss=loss)
    assert list(out.terms) == ["distillation"] and torch.isfinite(out.loss) and out.loss > 0
    actual = gradients(model, out.loss)
    assert not [name for name in actual if name.startswith(("fusion", "itm_head"))]
    assert set(actual) == {name for name, _ in model.dual.named_parameters(prefix="dual")}
    assert all(gradient.any() for name, gradient in actual.items() if not name.endswith("key.bias"))


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
    of_the_dual = {"temperature", "image_similarity", "text_similarity"}
    of_the_pairs = {"itm_accuracy", "rank_agreement", "rank_agreement_hard", "rank_agreement_easy"}
    assert set(out.terms) == {"itc", "itm"} and set(out.metrics) == of_the_dual | of_the_pairs
    out = step(distillation=0, itm=0)
    assert set(out.terms) == {"itc"} and set(out.metrics) == of_the_dual
    out = step(itc=0, itm=0, distillation=0)
    assert out.terms == {} and out.loss == 0 and out.loss.requires_grad


def test_distillation_scale_is_a_factor_on_that_term_alone():
    model = tiny_model().train()
    losses = [step(model, scale=s, distillation=2.0) for s in (0.5, 0.25, 1.0)]
    assert len({out.terms["distillation"].item() for out in losses}) == 1
    rest = losses[0].terms["itc"] + losses[0].terms["itm"]
    for scale, out in zip((0.5, 0.25, 1.0), losses):
        torch.testing.assert_close(out.loss, rest + 2.0 * scale * out.terms["distillation"])
    without = step(model, scale=0.0, distillation=2.0)
    torch.testing.assert_close(without.loss, rest)
    assert "distillation" not in without.terms  # It is not even computed.


def test_metrics():
    model = tiny_model().train()
    with torch.no_grad():
        model.itm_head.weight.zero_()
        model.itm_head.bias.copy_(torch.tensor([0.0, 1.0]))  # The head says yes to everything.
    out = step(model, num_negatives=2)
    torch.testing.assert_close(out.metrics["temperature"], 1 / model.dual.scale.detach())
    torch.testing.assert_close(out.metrics["itm_accuracy"], torch.tensor(8 / (8 + 2 * 8 * 2)))
    assert out.metrics["rank_agreement"] == 0 and out.metrics["valid_length"] == 0  # The teacher ties all candidates.
    assert "rank_agreement_hard" not in out.metrics  # Of two negatives one is hard, and has no order.
    assert not any(value.requires_grad for value in out.metrics.values())


def test_the_agreement_on_hard_and_on_easy_negatives():
    """Hard are those whose match score is above the mean of the query's negatives."""
    model = tiny_model().train()
    with torch.no_grad():
        model.itm_head.weight.mul_(30)
    batch = step_batch()
    built = build_objective(model, ObjectiveOptions(num_negatives=4))
    out, match = built(**batch), encoded_step(built, batch).match
    student, teacher, valid = (x.flatten(0, 1)[:, 1:] for x in (match.student, match.scores, match.valid))
    mean = (teacher * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    for name, part in (("hard", valid & (teacher > mean)), ("easy", valid & (teacher <= mean))):
        expected = kendall_tau(student, teacher, part)
        torch.testing.assert_close(out.metrics[f"rank_agreement_{name}"], expected)
