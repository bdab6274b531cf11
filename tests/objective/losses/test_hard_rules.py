"""Which negatives are hard, by each rule."""

import math

import torch

from loopitr.objective.losses import hard_above_mean, hard_above_threshold, hard_top


def test_hard_rules():
    teacher = torch.tensor([[2.0, 0.0, -1.0, math.nan], [-1.0, -1.0, -1.0, math.nan]])
    valid = ~teacher.isnan()
    assert hard_above_threshold(teacher, valid).tolist() == [[True, False, False, False], [False] * 4]
    assert torch.equal(hard_above_threshold(teacher, valid, probability=0.2), valid)
    assert hard_above_mean(teacher, valid).tolist() == [[True, False, False, False], [False] * 4]
    assert hard_top(teacher, valid, 2).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert torch.equal(hard_top(teacher, valid, 9), valid)
    masked = torch.tensor([[False, True, True, False]] * 2)
    assert hard_top(teacher, masked, 1).tolist() == [[False, True, False, False]] * 2


def test_of_equal_scores_none_is_above_their_mean():
    scores = torch.rand(200, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 7)
    assert not hard_above_mean(scores, torch.ones(200, 7, dtype=torch.bool)).any()
