"""Teachers: what they score, that nothing flows back into them, and training on the sum of both heads."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.step_reference import gradients, step_batch
from helpers.support import tiny_model

from loopitr import Distillation, Frozen, LoopObjective, Match, Matching, MatchPlusSimilarity, Momentum, Ranking, TopK
from loopitr.models.scoring import DUAL_ALONE
from loopitr.objective.build import build_objective, build_teacher
from loopitr.objective.losses import kl
from loopitr.objective.options import ObjectiveOptions
from loopitr.objective.step import Step


def model(seed=0, **changes):
    made = tiny_model(**changes).train()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(seed * 0.1 * torch.randn_like(parameter))
        made.itm_head.weight.mul_(30)  # match scores spread out
    return made


def a_step(student, teacher, **options):
    objective = LoopObjective(student, [Distillation(kl, teacher=teacher)], miner=TopK(3), **options)
    batch = step_batch()
    encoded = objective.encode(
        batch["input_ids"], batch["attention_mask"], pixel_values=batch["pixel_values"], image_tokens=None
    )
    return Step(objective, encoded, batch["identities"], batch["caption_ids"])


def teachers(student):
    return {
        "match": Match(),
        "match_plus_similarity": MatchPlusSimilarity(),
        "momentum": Momentum(student, decay=0.9),
        "frozen": Frozen(model(1), student=student),
    }


@pytest.mark.parametrize("name", ["match", "match_plus_similarity", "momentum", "frozen"])
def test_no_gradient_flows_into_a_teacher(name):
    student = model()
    teacher = teachers(student)[name]
    assert teacher.name == name
    step = a_step(student, teacher)
    scores = teacher(step)
    assert scores.shape == step.queries.valid.shape == (2, 8, 4) and not scores.requires_grad
    objective = LoopObjective(student, [Distillation(kl, teacher=teacher)], miner=TopK(3))
    found = gradients(objective, objective(**step_batch()).loss)
    assert any(float(gradient.abs().max()) > 0 for gradient in found.values())
    for part in ("fusion.", "itm_head.", "own_teacher."):
        assert not any(part in key and float(gradient.abs().max()) > 0 for key, gradient in found.items()), part


def test_what_the_models_own_teachers_say():
    student = model()
    step = a_step(student, Match())
    match, similarity = step.match.scores.detach(), step.queries.student.detach()
    assert torch.equal(Match()(step), match)
    for weight in (0.0, 0.25, 1.0):
        student.config.similarity_weight = weight
        torch.testing.assert_close(MatchPlusSimilarity()(step), match + weight * similarity)
    student.config.similarity_weight = 4.0  # of the order of match + 4 x similarity, on the student's scale
    torch.testing.assert_close(MatchPlusSimilarity()(step), match / 4 + similarity)
    student.config.similarity_weight = DUAL_ALONE
    torch.testing.assert_close(MatchPlusSimilarity()(step), similarity)


@pytest.mark.parametrize("across", [False, True])
def test_a_frozen_teacher_scores_the_students_candidates_with_its_own_tokens(across):
    student, other = model(), model(1)
    step = a_step(student, Frozen(other, student=student), mine_across_ranks=across)
    scores = step.objective.teacher(step)
    batch, pairs = step_batch(), step.candidates.pairs
    other.eval()
    with torch.no_grad():
        images = other.encode_images(batch["pixel_values"])
        texts = other.encode_texts(batch["input_ids"], batch["attention_mask"])
        expected = other.score_pairs(images, texts, pairs.flatten(0, 2)).score.view(pairs.shape[:3])
    torch.testing.assert_close(scores, expected)
    assert not torch.allclose(scores, step.match.scores)


def test_a_momentum_teacher_follows_the_model_by_its_decay():
    student = model()
    teacher = Momentum(student, decay=0.75)
    before = copy.deepcopy(student.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
        for buffer in student.buffers():
            if buffer.is_floating_point():
                buffer.add_(1.0)
    teacher.after_step(student)
    parameters = dict(student.named_parameters())
    for name, value in teacher.model.state_dict().items():
        now = student.state_dict()[name]
        expected = 0.75 * before[name] + 0.25 * now if name in parameters else now
        torch.testing.assert_close(value, expected, msg=name)
    objective = LoopObjective(student, [Distillation(kl, teacher=teacher)])
    objective.train()
    assert not teacher.model.training and student.training
    assert any(key.startswith("own_teacher.model.") for key in objective.state_dict())  # checkpoints have it


def test_the_teachers_model_is_not_run_while_distillation_does_not_count(monkeypatch):
    student = model()
    teacher = Momentum(student)
    objective = LoopObjective(student, [Matching(), Distillation(kl, teacher=teacher)])
    monkeypatch.setattr(teacher.model, "encode_texts", lambda *_: pytest.fail("the teacher was asked"))
    assert "distillation" not in objective(**step_batch(), distillation_scale=0.0).terms
    assert "distillation" not in objective(**step_batch(), with_pairs=False).terms


def test_teachers_by_option():
    student = model()
    kinds = {"match": Match, "match_plus_similarity": MatchPlusSimilarity, "momentum": Momentum}
    for name, kind in kinds.items():
        assert isinstance(build_objective(student, ObjectiveOptions(teacher=name)).teacher, kind)
    assert build_objective(student, ObjectiveOptions(distillation=0.0, teacher="momentum")).teacher is None
    options = ObjectiveOptions(teacher="frozen", teacher_model="runs/other")
    teacher = build_teacher(options, student, load=lambda path: {"runs/other": model(1)}[path])
    assert isinstance(build_objective(student, options, teacher=teacher).teacher, Frozen)
    with pytest.raises(ValueError, match="needs the model in runs/other"):
        build_objective(student, options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"name": "vit_tiny_patch16_224", "image_size": 64}}, "takes images of 64 pixels, the model of 32"),
        ({"vocab_size": 77}, "has a vocabulary of 77"),
    ],
)
def test_a_frozen_teacher_that_does_not_fit_is_refused(changes, message):
    student = model()
    vocab = changes.pop("vocab_size", None)
    if vocab is not None:
        changes["text"] = {**student.config.text, "vocab_size": vocab}
    with pytest.raises(ValueError, match=message):
        Frozen(tiny_model(**changes), student=student)


def test_a_frozen_teacher_that_is_not_finite_is_refused():
    broken = model(1)
    broken.itm_head.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"runs/x holds NaN or infinite weights: itm_head.bias"):
        Frozen(broken, student=model(), source="runs/x")


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "frozen"},
        {"teacher_model": "runs/x"},
        {"momentum": 1.0},
        {"teacher_margin": 101.0},
        {"sum_dropout": 1.5},
        {"teacher": "oracle"},
    ],
)
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="objective|teacher"):
        ObjectiveOptions(**options)


def summed(student, dropout, **options):
    terms = [Matching(**options), Ranking(0.5, **options)]
    return LoopObjective(student, terms, miner=TopK(3), sum_dropout=dropout)


@pytest.mark.slow
def test_training_on_the_sum_equals_plain_training_where_similarities_are_equal():
    """All candidates of a query get the same number: their order by LCE does not change."""
    student = model()
    with torch.no_grad():  # every image and every caption has the same embed
        for projection in (student.dual.vision_projection, student.dual.text_projection):
            projection.weight.zero_()
    plain, on_sum = (LoopObjective(student, [Ranking()], miner=TopK(3), sum_dropout=share) for share in (None, 0.0))
    first, second = plain(**step_batch()), on_sum(**step_batch())
    torch.testing.assert_close(first.loss, second.loss)
    for name, gradient in gradients(student, first.loss).items():
        torch.testing.assert_close(gradients(student, on_sum(**step_batch()).loss)[name], gradient, msg=name)


def test_on_the_sum_each_score_has_its_similarity_without_gradient():
    student = model()
    objective = summed(student, 0.0)
    batch = step_batch()
    encoded = objective.encode(batch["input_ids"], batch["attention_mask"], pixel_values=batch["pixel_values"])
    step = Step(objective, encoded, batch["identities"], batch["caption_ids"])
    torch.testing.assert_close(step.trained_match.scores, step.match.scores + step.queries.student)
    found = gradients(student, objective(**batch).loss)
    for name in ("vision_projection.weight", "text_projection.weight", "logit_scale"):
        assert float(found.get(f"dual.{name}", torch.zeros(1)).abs().max()) == 0, name


def test_the_similarity_is_left_out_for_a_share_of_the_queries():
    student = model()
    objective, shares = summed(student, 0.3), []
    batch = step_batch()
    encoded = objective.encode(batch["input_ids"], batch["attention_mask"], pixel_values=batch["pixel_values"])
    for _ in range(200):
        step = Step(objective, encoded, batch["identities"], batch["caption_ids"])
        step.__dict__.update(match=shares[0][0].match if shares else step.match)
        difference = step.trained_match.scores - step.match.scores
        kept = torch.isclose(difference, step.queries.student, atol=1e-4)
        left_out = torch.isclose(difference, torch.zeros(()), atol=1e-4)
        assert (kept.all(-1) | left_out.all(-1)).all()  # a whole query at a time
        shares.append((step, float(left_out.all(-1).float().mean())))
    assert abs(sum(share for _, share in shares) / len(shares) - 0.3) < 0.05
    assert torch.equal(
        summed(student, 1.0)(**batch).loss, LoopObjective(student, objective.terms, miner=TopK(3))(**batch).loss
    )
