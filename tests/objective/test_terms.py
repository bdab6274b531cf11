"""Terms as objects: as from options, each part of a step computed once, losses in loops, terms of one's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial

import pytest
import torch
from helpers.step_reference import (
    CASES,
    EveryThirdWord,
    assert_same_gradients,
    embeds_of,
    gradients,
    is_positive,
    step_batch,
)
from helpers.support import tiny_model
from torch import Tensor

from loopitr import (
    Agreement,
    Contrastive,
    Distillation,
    FrozenContrast,
    LoopITRModel,
    LoopObjective,
    Matching,
    PartialRanking,
    Ranking,
    SigmoidContrastive,
    StructureTransfer,
    Term,
    TermOutput,
    TopK,
    WordPrediction,
)
from loopitr.objective import losses
from loopitr.objective.build import build_objective
from loopitr.objective.options import ObjectiveOptions
from loopitr.objective.step import Step

KL = partial(losses.kl, teacher_temperature=1.0)
CPRD = PartialRanking(losses.hard_above_mean)
MASKING = EveryThirdWord()
# The terms that the options in `CASES` stand for, and the number of negatives.
OBJECTS: dict[str, tuple[list[Term], int]] = {
    "itc": ([Contrastive()], 4),
    "cprd": ([Contrastive(), Matching(), Ranking(0.5), Distillation(CPRD)], 3),
    "kl_and_mlm": ([Contrastive(), Matching(), Distillation(KL), WordPrediction(MASKING)], 3),
    "one_negative": ([Contrastive(), Matching(negatives=1), Distillation(CPRD)], 4),
    "teacher_only": ([Contrastive(), Distillation(KL)], 4),
    "sigmoid": ([SigmoidContrastive(), Matching()], 4),
    "agreement": ([Contrastive(), Matching(), Distillation(KL), Agreement(0.5)], 3),
    "projections_and_mlm": (
        [Contrastive(), Matching(), Distillation(CPRD, backbones=False), WordPrediction(MASKING)],
        3,
    ),
}


def model_for(case: str) -> LoopITRModel:
    bias = -2.0 if case == "sigmoid" else None
    agreement = {"agreement": 12 if "agreement" in case else None}
    return tiny_model(mlm_head="mlm" in case, initial_logit_bias=bias, fusion=agreement).train()


@pytest.mark.parametrize("case", CASES)
def test_objects_give_the_loss_and_the_gradients_of_the_options(case):
    terms, negatives = OBJECTS[case]
    model, batch = model_for(case), step_batch()
    by_options = build_objective(model, ObjectiveOptions(**CASES[case]), masking=MASKING)(**batch)
    by_objects = LoopObjective(model, terms, miner=TopK(negatives))(**batch)
    assert torch.equal(by_objects.loss, by_options.loss)
    assert list(by_objects.terms) == list(by_options.terms)
    expected, got = gradients(model, by_options.loss), gradients(model, by_objects.loss)
    assert got.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(got[name], expected[name])]


# Parts


PARTS = [name for name, part in vars(Step).items() if isinstance(part, cached_property)]


@pytest.fixture
def computed(monkeypatch) -> Counter[str]:
    """How often each part of a step was computed, and `score_pairs` called."""
    counts: Counter[str] = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in PARTS:
        part = cached_property(counted(name, vars(Step)[name].func))
        part.__set_name__(Step, name)
        monkeypatch.setattr(Step, name, part)
    monkeypatch.setattr(LoopITRModel, "score_pairs", counted("score_pairs", LoopITRModel.score_pairs))
    return counts


def test_each_part_is_computed_once(computed):
    terms = [*OBJECTS["kl_and_mlm"][0], Ranking(), StructureTransfer(), FrozenContrast(), Agreement()]
    LoopObjective(model_for("mlm and agreement"), terms, miner=TopK(3))(**step_batch())
    asked = [part for part in PARTS if part != "teacher_states"]  # The teacher is the model itself.
    assert computed == dict.fromkeys([*asked, "score_pairs"], 1)


@dataclass(frozen=True)
class OwnPair(Term):
    """A term of one's own: the similarity of each image with its own caption is to be high."""

    weight: float = 1.0
    name = "own_pair"

    def __call__(self, step: Step) -> Tensor:
        return -step.similarities.per_image.diagonal().mean()


def test_only_what_a_term_asks_for_is_computed(computed):
    LoopObjective(tiny_model().train(), [OwnPair()])(**step_batch())
    assert computed == {"similarities": 1, "embeds": 1, "rows": 1}
    computed.clear()
    LoopObjective(tiny_model().train(), [StructureTransfer(), Contrastive()])(**step_batch())
    assert computed == {"similarities": 1, "embeds": 1, "positives": 1, "gathered": 1, "rows": 1}


# Token agreement


def agreement_loop(model: LoopITRModel, batch: dict[str, Tensor]) -> Tensor:
    """InfoNCE over what agreement adds to the match score of each pair, query by query."""
    images, texts = model.encode_images(batch["pixel_values"]), model.encode_texts(*captions_of(batch))
    logits = model.agreement_of_all(images, texts)
    losses = []
    for i in range(len(logits)):
        for row, positives in (
            (logits[i], [j for j in range(len(logits)) if is_positive(batch, i, j)]),
            (logits[:, i], [j for j in range(len(logits)) if is_positive(batch, j, i)]),
        ):
            losses.append(sum(row.logsumexp(0) - row[j] for j in positives) / len(positives))
    return sum(losses) / len(losses)


def captions_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["attention_mask"]


@pytest.mark.parametrize("with_pairs", [True, False])
def test_agreement_is_the_loss_written_out_over_queries(with_pairs):
    """Whether match scores are computed or not, which they are part of; and whoever waits for a gradient gets one."""
    model, batch = model_for("agreement"), step_batch()
    terms = [Contrastive(), Matching(), Agreement(0.5)]
    out = LoopObjective(model, terms)(**batch, with_pairs=with_pairs)
    expected = agreement_loop(model, batch)
    assert expected > 1
    torch.testing.assert_close(out.terms["agreement"], expected, atol=1e-6, rtol=1e-5)
    every = gradients(model, out.loss)
    assert every.keys() == {name for name, _ in model.named_parameters()}
    assert all(every[name].any() for name in every if name.startswith("agreement."))
    found = gradients(model, LoopObjective(model, [Agreement()])(**batch).loss)
    assert_same_gradients(found, gradients(model, expected))


def test_matching_trains_the_agreement_too():
    model, batch = model_for("agreement"), step_batch()
    found = gradients(model, LoopObjective(model, [Matching()])(**batch).loss)
    assert all(found[f"agreement.{name}"].any() for name, _ in model.agreement.named_parameters())
    left_out = gradients(model, LoopObjective(model, [Contrastive(), Matching()])(**batch, with_pairs=False).loss)
    assert left_out.keys() == {name for name, _ in model.named_parameters()}  # DDP waits for each
    assert not any(left_out[name].any() for name in left_out if name.startswith("agreement."))


def test_agreement_needs_its_head():
    with pytest.raises(ValueError, match="objective.agreement needs a model with token agreement"):
        build_objective(tiny_model(), ObjectiveOptions(agreement=0.5))


# The list of terms


def test_two_terms_of_one_name_are_refused():
    with pytest.raises(ValueError, match="terms must have different names, got itc, itm, itm"):
        LoopObjective(tiny_model(), [Contrastive(), Matching(), Matching(0.5)])


@pytest.mark.parametrize("term", [Matching, Ranking])
def test_more_negatives_than_are_mined_and_none_are_refused(term):
    LoopObjective(tiny_model(), [term(negatives=4)], miner=TopK(4))
    with pytest.raises(ValueError, match=f"the term {term.name} trains on 5 negatives, but the miner chooses 4"):
        LoopObjective(tiny_model(), [term(negatives=5)], miner=TopK(4))
    with pytest.raises(ValueError, match="negatives must be at least 1, got 0"):
        term(negatives=0)


def test_a_term_of_weight_0_is_left_out():
    objective = LoopObjective(
        tiny_model().train(), [Contrastive(), Matching(0.0), Matching(0.5), WordPrediction(None, 0)]
    )
    assert [term.weight for term in objective.terms] == [1.0, 0.5]
    assert list(objective(**step_batch()).terms) == ["itc", "itm"]


@pytest.mark.parametrize("masking, mlm_head", [(None, True), (MASKING, False)])
def test_word_prediction_needs_a_head_and_masking(masking, mlm_head):
    with pytest.raises(ValueError, match="objective.mlm needs a model with an mlm_head and a tokenizer with a mask"):
        LoopObjective(tiny_model(mlm_head=mlm_head), [WordPrediction(masking)])


def test_terms_with_different_negatives_train_on_the_larger_number_and_each_uses_its_own():
    model, batch = tiny_model().train(), step_batch()
    both = LoopObjective(model, [Matching(negatives=1), Ranking(negatives=3)], miner=TopK(4))
    assert both.trained_negatives == 3
    out = both(**batch)
    alone = [LoopObjective(model, [term], miner=TopK(4))(**batch) for term in both.terms]
    expected = [gradients(model, one.loss) for one in alone]
    for one in alone:
        for name, value in one.terms.items():
            torch.testing.assert_close(out.terms[name], value)
    got = gradients(model, out.loss)
    for name in ("itm_head.weight", "dual.vision.model.blocks.0.mlp.fc1.weight"):
        torch.testing.assert_close(got[name], expected[0][name] + expected[1][name], atol=1e-6, rtol=1e-4)
    more = LoopObjective(model, [Matching(negatives=3)], miner=TopK(4))(**batch)
    assert not torch.equal(more.terms["itm"], out.terms["itm"])


# Terms of one's own


def test_a_term_of_ones_own_is_weighted_and_differentiated():
    model, batch = tiny_model().train(), step_batch()
    out = LoopObjective(model, [Contrastive(), OwnPair(0.5)])(**batch)
    embeds = embeds_of(model, batch)
    expected = -(model.dual.scale * (embeds["image"] * embeds["text"]).sum(1)).mean()
    torch.testing.assert_close(out.terms["own_pair"], expected)
    torch.testing.assert_close(out.loss, out.terms["itc"] + 0.5 * out.terms["own_pair"])
    assert any(gradient.any() for gradient in gradients(model, out.terms["own_pair"]).values())


class HighestSimilarity(OwnPair):
    def __call__(self, step: Step) -> TermOutput:
        return TermOutput(super().__call__(step), {"highest": step.similarities.per_image.detach().max()})


def test_metrics_of_a_term_reach_the_log():
    out = LoopObjective(tiny_model().train(), [HighestSimilarity()])(**step_batch())
    assert out.metrics.keys() == {"temperature", "image_similarity", "text_similarity", "highest"}
    assert out.metrics["highest"] >= -out.terms["own_pair"]


@dataclass(frozen=True)
class Confidence(Term):
    """A term of one's own on match scores: those of positives are to be high."""

    weight: float = 1.0
    name = "confidence"
    uses_pairs = True

    def __call__(self, step: Step) -> Tensor:
        return -step.match.scores[..., 0].mean()


def test_a_term_of_ones_own_that_asks_for_match_scores_trains_them():
    model = tiny_model().train()
    objective = LoopObjective(model, [Confidence()], miner=TopK(2))
    assert objective.trained_negatives == 2
    assert gradients(model, objective(**step_batch()).loss)["itm_head.weight"].any()


def test_a_term_that_does_not_say_that_it_asks_for_match_scores_is_refused(monkeypatch):
    monkeypatch.setattr(Confidence, "uses_pairs", False)
    with pytest.raises(ValueError, match="the term 'confidence' asks for match scores: give it uses_pairs = True"):
        LoopObjective(tiny_model().train(), [Confidence()], miner=TopK(2))(**step_batch())
