"""Options of the step that are refused."""

from __future__ import annotations

from typing import get_args

import pytest

from loopitr.objective.losses.distillation import WHOLE_LIST_LOSSES
from loopitr.objective.options import DistillationName, ObjectiveOptions


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distillation_loss": "hinge"}, "unknown distillation_loss 'hinge'; known: kl, cprd"),
        ({"itc_loss": "hinge"}, "unknown itc_loss 'hinge'; known: softmax, sigmoid"),
        ({"mining": "random"}, "unknown mining 'random'; known: topk, sample, stratified"),
        ({"hard_rule": "median"}, "unknown hard_rule 'median'; known: threshold, mean, top"),
        ({"num_negatives": 0}, "objective.num_negatives must be at least 1, got 0"),
        ({"agreement": -0.5}, "objective.agreement must be a weight >= 0, got -0.5"),
        ({"itc": -1.0}, "objective.itc must be a weight >= 0, got -1.0"),
        ({"mlm_probability": 0.0}, "objective.mlm_probability must be between 0 and 1, got 0.0"),
        ({"mlm_probability": 1.0}, "objective.mlm_probability must be between 0 and 1, got 1.0"),
        ({"distillation": float("nan")}, "objective.distillation must be a weight >= 0, got nan"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveOptions(**options)


def test_every_distillation_loss_has_a_name_among_the_options():
    assert {*WHOLE_LIST_LOSSES, "cprd"} == {*get_args(DistillationName)}
