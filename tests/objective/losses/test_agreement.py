import math
from itertools import combinations

import pytest
import torch

from loopitr.objective.losses import kendall_tau


def test_same_reversed_and_partly_swapped_order():
    teacher = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    assert kendall_tau(teacher.exp(), teacher, valid).item() == 1
    assert kendall_tau(-teacher, teacher, valid).item() == -1
    assert kendall_tau(torch.tensor([[3.0, 4.0, 2.0, 1.0]]), teacher, valid).item() == pytest.approx(4 / 6)
    assert kendall_tau(torch.zeros(1, 4), teacher, valid).item() == 0


def test_against_counting_pairs():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randint(0, 4, (8, 5), generator=generator).float() for _ in range(2))
    valid = torch.rand(8, 5, generator=generator) < 0.7
    rows = []
    for s, t, v in zip(student.tolist(), teacher.tolist(), valid.tolist()):
        pairs = [(i, j) for i, j in combinations(range(5), 2) if v[i] and v[j] and t[i] != t[j]]
        signs = [0 if s[i] == s[j] else (1 if (s[i] > s[j]) == (t[i] > t[j]) else -1) for i, j in pairs]
        rows += [sum(signs) / len(signs)] if signs else []
    assert kendall_tau(student, teacher, valid).item() == pytest.approx(sum(rows) / len(rows), abs=1e-6)


def test_undefined_is_zero_and_masked_slots_are_ignored():
    junk = torch.tensor([[1.0, math.nan, 2.0], [math.inf, math.nan, 1.0]])
    valid = torch.tensor([[True, False, True], [False, False, True]])
    assert kendall_tau(junk, junk, valid).item() == 1
    assert kendall_tau(junk, torch.ones(2, 3), valid).item() == 0
    assert kendall_tau(junk, junk, torch.zeros_like(valid)).item() == 0


def test_no_value_is_read_back_from_the_device():
    x = torch.zeros(4, 5, device="meta")  # A tensor on `meta` has no values: reading one is an error.
    assert kendall_tau(x, x, x > 0).shape == ()


def test_no_gradient():
    student = torch.randn(2, 3, requires_grad=True)
    assert not kendall_tau(student, student, torch.ones(2, 3, dtype=torch.bool)).requires_grad
