"""A step on what a frozen text backbone made earlier is the step that runs it: losses, gradients, masked captions."""

from __future__ import annotations

import pytest
import torch
from helpers.step_reference import CASES, EveryThirdWord, assert_same_gradients, gradients, model_of, step_batch
from helpers.support import BERT, tiny_model

from loopitr.models.text_backbone import TextBackbone
from loopitr.objective.build import build_objective
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.options import ObjectiveOptions

MODELS = {
    "late": {},
    "shared": {"style": "shared", "layers": 1},
    "shared, first token": {"style": "shared", "fusion": {"first_token_id": 7}},
    "own pooling": {"text_pooling": "backbone"},
    "mean": {"text_pooling": "mean"},
}


def frozen_objective(case="cprd", **model):
    options = ObjectiveOptions(**CASES[case])
    made = model_of(options, **model)
    made.freeze(["text"])
    return build_objective(made, options, masking=EveryThirdWord())


def with_features(objective):
    """The batch with the text backbone's outputs beside it; padding holds something else than the backbone gave."""
    batch = step_batch()
    with torch.no_grad():
        features = objective.model.text_features(batch["input_ids"], batch["attention_mask"])
    tokens = features.tokens * batch["attention_mask"][..., None]
    return {**batch, "text_tokens": tokens, "text_pooled": features.pooled}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_a_run(case, model):
    objective = frozen_objective(case, **MODELS[model])
    expected = objective(**step_batch())
    found = objective(**with_features(objective))
    assert found.terms.keys() == expected.terms.keys()
    for name, value in expected.terms.items():
        torch.testing.assert_close(found.terms[name], value, atol=1e-6, rtol=1e-5)
    wanted = gradients(objective.model, expected.loss)
    objective.model.zero_grad()
    assert_same_gradients(gradients(objective.model, found.loss), wanted)


def test_it_is_these_features_that_are_read():
    objective = frozen_objective()
    batch = with_features(objective)
    expected = objective(**batch).loss
    for name in ("text_tokens", "text_pooled"):
        assert not torch.allclose(objective(**{**batch, name: batch[name].flip(0)}).loss, expected)


@pytest.mark.parametrize("case", ["cprd", "kl_and_mlm"])
def test_the_backbone_runs_for_masked_captions_alone(case, monkeypatch):
    objective = frozen_objective(case)
    batch, seen = with_features(objective), []
    forward = TextBackbone.forward

    def noting(self, input_ids, *args, **kwargs):
        seen.append(input_ids)
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(TextBackbone, "forward", noting)
    objective(**batch)
    if case == "cprd":
        assert seen == []
    else:
        (masked,) = seen
        assert masked.shape == batch["input_ids"].shape and not torch.equal(masked, batch["input_ids"])


@pytest.mark.parametrize("case", ["cprd", "kl_and_mlm"])
def test_in_chunks(case):
    objective = frozen_objective(case)
    wanted = gradients(objective.model, objective(**step_batch()).loss)
    objective.model.zero_grad()
    cached_backward(objective, with_features(objective), chunk_size=3)
    found = {name: p.grad for name, p in objective.model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert_same_gradients(found, wanted)


def test_half_precision_becomes_the_models():
    model = tiny_model(text=BERT)
    ids = torch.tensor([[2, 7, 3]])
    features = model.text_features(ids, torch.ones_like(ids))
    halved = type(features)(features.pooled.half(), features.tokens.half())
    state = model.text_state(halved, torch.ones_like(ids))
    assert state.tokens.dtype == state.embeds.dtype == torch.float32
    torch.testing.assert_close(state.tokens, features.tokens, atol=1e-2, rtol=1e-2)
