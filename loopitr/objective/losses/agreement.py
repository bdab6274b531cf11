"""The rank correlation of student and teacher, for logging."""

from __future__ import annotations

import torch
from torch import Tensor

from .means import check_same_shape, mean_of_row_means


@torch.no_grad()
def kendall_tau(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Kendall's tau of each query's candidates, averaged over queries: 1 same order, -1 reversed, 0 when undefined.

    student, teacher, valid `[Q, C]`. For a query it is the mean of sign(s_i - s_j) sign(t_i - t_j) over the valid pairs
    whose teacher scores differ. Queries without such a pair are left out. No gradient.
    """
    check_same_shape(student=student, teacher=teacher, valid=valid)
    student, teacher = (torch.where(valid, scores, 0.0) for scores in (student, teacher))
    teacher_order, student_order = _pair_order(teacher), _pair_order(student)  # [Q, C, C]
    pairs = valid[:, :, None] & valid[:, None, :] & (teacher_order != 0)  # [Q, C, C], each pair twice
    return mean_of_row_means((teacher_order * student_order).flatten(1), pairs.flatten(1))


def _pair_order(scores: Tensor) -> Tensor:
    # sign(a - b) will not do: inf - inf is NaN, and a difference may underflow.
    first, second = scores[:, :, None], scores[:, None, :]
    return (first > second).float() - (first < second).float()  # [Q, C, C]
