"""Distillation into the projections alone: the backbones and the fusion head get no gradient of it."""

from __future__ import annotations

import pytest
import torch
from helpers.step_reference import CASES, assert_same_gradients, gradients, step_batch
from helpers.support import tiny_model

from loopitr.objective.build import build_objective
from loopitr.objective.options import ObjectiveOptions

ONLY = {"itc": 0.0, "itm": 0.0, "num_negatives": 3}


POOLED = {  # Its own pooling is an attention layer with weights.
    "name": "vit_base_patch16_siglip_224",
    "image_size": 32,
    "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
}


def distilled(trains: str, **changes):
    """The loss and the gradients of the distillation, for the parameters that it reaches."""
    model = tiny_model(**changes).train()
    output = build_objective(model, ObjectiveOptions(**ONLY, distillation_trains=trains))(**step_batch())
    reached = gradients(model, output.loss)
    return output, {name: gradient for name, gradient in reached.items() if gradient.any()}


@pytest.mark.parametrize("changes", [{}, {"fusion": {"style": "shared"}}, {"vision": POOLED}])
def test_the_projections_get_the_same_gradient_and_the_backbones_none(changes):
    everything, all_gradients = distilled("all", **changes)
    apart, own = distilled("projections", **changes)
    torch.testing.assert_close(apart.terms["distillation"], everything.terms["distillation"])
    heads = {name for name in all_gradients if name.startswith(("dual.vision_projection", "dual.text_projection"))}
    assert set(own) == heads | {"dual.logit_scale"} < set(all_gradients)
    assert_same_gradients(own, {name: all_gradients[name] for name in own})


def test_the_other_losses_are_what_they_were():
    options = CASES["projections_and_mlm"] | {"mlm": 0.0}
    steps = {
        trains: build_objective(tiny_model().train(), ObjectiveOptions(**options | {"distillation_trains": trains}))(
            **step_batch()
        )
        for trains in ("all", "projections")
    }
    for name, value in steps["all"].terms.items():
        torch.testing.assert_close(steps["projections"].terms[name], value)


def test_cached_tokens_of_frozen_backbones():
    model = tiny_model().train()
    model.freeze(["vision", "text"])
    options = ObjectiveOptions(**ONLY, distillation_trains="projections")
    batch = step_batch()
    plain = build_objective(model, options)(**batch)
    tokens = {"image_tokens": model.encode_images(batch.pop("pixel_values")).tokens.detach()}
    features = model.text_features(batch["input_ids"], batch["attention_mask"])
    tokens |= {"text_tokens": features.tokens.detach(), "text_pooled": features.pooled.detach()}
    cached = build_objective(model, options)(**batch, **tokens)
    torch.testing.assert_close(cached.terms["distillation"], plain.terms["distillation"])


def test_a_model_in_half_precision():
    model, batch = tiny_model().to(torch.bfloat16).train(), step_batch()
    objective = build_objective(model, ObjectiveOptions(**ONLY, distillation_trains="projections"))
    output = objective(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    assert gradients(model, output.loss)["dual.text_projection.weight"].any()
