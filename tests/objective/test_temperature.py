"""Trained temperatures stay within their limits, and can leave them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.step_reference import gradients, step_batch
from helpers.support import tiny_model

from loopitr import Agreement, Contrastive, LoopObjective


@pytest.mark.parametrize("head", ["dual", "agreement"])
def test_a_temperature_at_its_limit_can_rise_again(head):
    """CLIP's is there from the start. Beyond the limit, the gradient of a clamp would be zero for ever."""
    model = tiny_model(fusion={"agreement": 12}).train()
    objective = LoopObjective(model, [Contrastive(), Agreement()])
    log_scale = getattr(model, head).logit_scale
    with torch.no_grad():
        log_scale.fill_(math.log(100) + 0.5)
    beyond = objective(**step_batch()).loss
    assert gradients(model, beyond)[f"{head}.logit_scale"] != 0
    objective.after_step()
    assert log_scale.item() == pytest.approx(math.log(100))
    at_it = objective(**step_batch()).loss
    torch.testing.assert_close(at_it, beyond)
    assert gradients(model, at_it)[f"{head}.logit_scale"] != 0
    model.freeze(["dual_head", "fusion"])
    with torch.no_grad():
        log_scale.fill_(5.0)
    objective.after_step()
    assert log_scale == 5  # A frozen weight stays as it is.
