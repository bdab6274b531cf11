"""Distillation losses `(student [Q, C], teacher [Q, C], valid [Q, C]) -> scalar`, from the cross to the dual encoder.

A row is a query, a column one of its candidates. `student` is similarity / temperature; `teacher` is a score that the
caller has detached. Slots outside `valid` are ignored, even if they hold NaN. A loss is the mean over the queries that
its docstring says count; with none it is zero. Candidates of equal teacher score are ranked in column order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .means import at_least_float32, check_positive, check_same_shape, lowest, masked_mean, mean_of_row_means


def kl(student: Tensor, teacher: Tensor, valid: Tensor, *, teacher_temperature: float = 1.0) -> Tensor:
    """KL(p || q), p = softmax(teacher / T), q = softmax(student), both over the valid candidates of a query.

    LoopITR's "mimic the scores" (arXiv 2203.05465). Queries with at least two valid candidates count.
    """
    check_positive("teacher_temperature", teacher_temperature)
    student, teacher = _prepare(student, teacher, valid)
    log_q = student.log_softmax(dim=-1)  # [Q, C]
    log_p = _masked(teacher / teacher_temperature, valid).log_softmax(dim=-1)  # [Q, C]
    divergence = torch.where(valid, log_p.exp() * (log_p - log_q), 0.0).sum(-1)  # [Q]
    return masked_mean(divergence, valid.sum(-1) > 1)


def listnet(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Top-one ListNet (Cao et al., ICML 2007): -sum_j softmax(teacher)_j log softmax(student)_j.

    `kl` plus the teacher's entropy: the same gradient. Queries with at least two valid candidates count.
    """
    student, teacher = _prepare(student, teacher, valid)
    terms = -teacher.softmax(dim=-1) * student.log_softmax(dim=-1)  # [Q, C]
    return masked_mean(torch.where(valid, terms, 0.0).sum(-1), valid.sum(-1) > 1)


def cprd(student: Tensor, teacher: Tensor, valid: Tensor, hard: Tensor) -> Tensor:
    """Contrastive partial ranking distillation (arXiv 2407.07479).

    With a query's K valid candidates sorted by teacher, descending, and its first J being hard:
        L_i = -1/J sum_{j=1..J} log( exp(s_j) / sum_{k=j..K} exp(s_k) ),  averaged over the queries with J > 0.
    Easy candidates occur in the denominators, but their own order has no effect. `hard [Q, C]` comes from one of the
    `hard_*` rules, applied to candidates without the query's positive. When J = K the last term is always 0, and
    still counts in the mean. A candidate that is not in `hard` is easy even if the teacher ranks it above a hard one.
    """
    check_same_shape(valid=valid, hard=hard)
    student, teacher = _prepare(student, teacher, valid)
    hard = hard & valid
    order = _teacher_order(teacher, valid, first=hard)  # [Q, C]
    return mean_of_row_means(_plackett_luce_terms(student, order), hard.gather(-1, order))


def listmle(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """ListMLE (Xia et al., ICML 2008): -log P(teacher's order) under Plackett-Luce with the student's scores.

    The sum, as published, of the terms that `cprd` averages when everything is hard. Queries with at least two valid
    candidates count.
    """
    student, teacher = _prepare(student, teacher, valid)
    order = _teacher_order(teacher, valid, first=valid)  # [Q, C]
    terms = torch.where(valid.gather(-1, order), _plackett_luce_terms(student, order), 0.0)  # [Q, C]
    return masked_mean(terms.sum(-1), valid.sum(-1) > 1)


def margin_mse(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Margin-MSE (arXiv 2010.02666): mean over negatives j of ((s_0 - s_j) - (t_0 - t_j))^2.

    Candidate 0 is the query's positive. Queries whose positive and at least one negative are valid count. Student and
    teacher scores must be on one scale.
    """
    student, teacher = _prepare(student, teacher, valid, fill=0.0)
    gap = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])  # [Q, C - 1]
    return mean_of_row_means(gap.square(), valid[:, :1] & valid[:, 1:])


def ranknet(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """RankNet (Burges et al., ICML 2005): mean over pairs with t_i > t_j of log(1 + exp(s_j - s_i)).

    Queries with at least one pair of unequal teacher scores count.
    """
    student, teacher = _prepare(student, teacher, valid, fill=0.0)
    pairs = valid[:, :, None] & valid[:, None, :] & (teacher[:, :, None] > teacher[:, None, :])  # [Q, C, C]
    losses = F.softplus(student[:, None, :] - student[:, :, None])  # [Q, C, C]
    return mean_of_row_means(losses.flatten(1), pairs.flatten(1))


def adr_mse(student: Tensor, teacher: Tensor, valid: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Approximate discounted rank MSE (Rank-DistiLLM, arXiv 2405.07920).

    Mean over candidates of (r_i - soft_i)^2 / log2(r_i + 1), with r the teacher's rank from 1 and
    soft_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / T). Queries with at least two valid candidates count.
    """
    check_positive("temperature", temperature)
    student, teacher = _prepare(student, teacher, valid, fill=0.0)
    order = _teacher_order(teacher, valid, first=valid)  # [Q, C]
    rank = order.argsort(dim=-1).to(student.dtype) + 1  # [Q, C] the inverse permutation
    others = valid[:, None, :] & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)  # [Q, C, C]
    above = torch.sigmoid((student[:, None, :] - student[:, :, None]) / temperature)  # [Q, C, C] j above i
    soft_rank = 1 + torch.where(others, above, 0.0).sum(-1)  # [Q, C]
    losses = (rank - soft_rank).square() / (rank + 1).log2()  # [Q, C]
    return mean_of_row_means(losses, valid & (valid.sum(-1, keepdim=True) > 1))


def hard_above_threshold(teacher_log_odds: Tensor, valid: Tensor, *, probability: float = 0.5) -> Tensor:
    """Hard are the negatives that the cross encoder takes for matches: sigmoid(teacher) > probability. `[Q, C]`."""
    check_same_shape(teacher_log_odds=teacher_log_odds, valid=valid)
    if not 0 < probability < 1:
        raise ValueError(f"expected 0 < probability < 1, got {probability}")
    return valid & (teacher_log_odds > math.log(probability / (1 - probability)))


def hard_above_mean(teacher: Tensor, valid: Tensor) -> Tensor:
    """Hard are those above the mean of the query's valid candidates; none if all scores are equal. `[Q, C]`."""
    check_same_shape(teacher=teacher, valid=valid)
    scores = at_least_float32(teacher)
    # Measured from the lowest score, the mean of equal scores is exactly theirs. Rounded, it might be below them.
    above = torch.where(valid, scores - torch.where(valid, scores, torch.inf).amin(-1, keepdim=True), 0.0)  # [Q, C]
    return valid & (above > above.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1))


def hard_top(teacher: Tensor, valid: Tensor, m: int) -> Tensor:
    """Hard are the first `m` valid candidates in the teacher's order. `[Q, C]`."""
    check_same_shape(teacher=teacher, valid=valid)
    if m < 1:
        raise ValueError(f"expected m >= 1, got {m}")
    rank = _teacher_order(teacher, valid, first=valid).argsort(dim=-1)  # [Q, C] from 0
    return valid & (rank < m)


class DistillationLoss(ABC):
    """A loss on the candidates of each query, `[Q, 1 + K]`, the positive first.

    Calling it computes the loss. A caller that also needs the mask of the ranked candidates calls `ranked` and then
    `of_ranked`, which does not compute the mask again.
    """

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
        """The scalar loss."""
        return self.of_ranked(student, teacher, valid, self.ranked(teacher, valid))

    @abstractmethod
    def ranked(self, teacher: Tensor, valid: Tensor) -> Tensor:
        """Bool mask `[Q, C]` of the candidates whose order the student learns."""

    @abstractmethod
    def of_ranked(self, student: Tensor, teacher: Tensor, valid: Tensor, ranked: Tensor) -> Tensor:
        """The scalar loss; `ranked` is the mask that the method `ranked` returned."""


@dataclass(frozen=True)
class WholeList(DistillationLoss):
    """One of the functions of this module, on all candidates, the positive included."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]

    def ranked(self, teacher: Tensor, valid: Tensor) -> Tensor:
        return valid

    def of_ranked(self, student: Tensor, teacher: Tensor, valid: Tensor, ranked: Tensor) -> Tensor:
        return self.function(student, teacher, valid)


@dataclass(frozen=True)
class PartialRanking(DistillationLoss):
    """`cprd` of a query's negatives alone; `hard_rule(teacher, valid)` says which of them are hard.

    Example:
        >>> import torch
        >>> from loopitr import PartialRanking
        >>> student, teacher = torch.tensor([[5.0, 1.0, 2.0]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> PartialRanking()(student, teacher, torch.ones(1, 3, dtype=torch.bool))  # -log softmax([1, 2])[0]
        tensor(1.3133)
    """

    hard_rule: Callable[[Tensor, Tensor], Tensor] = hard_above_mean

    def ranked(self, teacher: Tensor, valid: Tensor) -> Tensor:
        return self.hard_rule(teacher[:, 1:], valid[:, 1:])

    def of_ranked(self, student: Tensor, teacher: Tensor, valid: Tensor, ranked: Tensor) -> Tensor:
        return cprd(student[:, 1:], teacher[:, 1:], valid[:, 1:], ranked)


# The functions on whole lists, by the names that `objective.distillation_loss` gives them.
WHOLE_LIST_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "listnet": listnet,
    "listmle": listmle,
    "margin_mse": margin_mse,
    "ranknet": ranknet,
    "adr_mse": adr_mse,
}


def _masked(scores: Tensor, valid: Tensor, fill: float | None = None) -> Tensor:
    # Invalid slots are replaced before any arithmetic: NaN times a gradient of zero would still be NaN.
    return torch.where(valid, scores, lowest(scores) if fill is None else fill)


def _prepare(student: Tensor, teacher: Tensor, valid: Tensor, fill: float | None = None) -> tuple[Tensor, Tensor]:
    check_same_shape(student=student, teacher=teacher, valid=valid)
    return _masked(at_least_float32(student), valid, fill), _masked(at_least_float32(teacher), valid, fill)


def _teacher_order(teacher: Tensor, valid: Tensor, *, first: Tensor) -> Tensor:
    """Column indices `[Q, C]`: those in `first`, the other valid ones, the rest; each part by descending teacher."""
    order = _masked(teacher, valid).argsort(dim=-1, descending=True, stable=True)  # [Q, C]
    block = torch.where(first, 0, torch.where(valid, 1, 2))  # [Q, C]
    return order.gather(-1, block.gather(-1, order).argsort(dim=-1, stable=True))


def _plackett_luce_terms(student: Tensor, order: Tensor) -> Tensor:
    """log sum_{k >= j} exp(s_k) - s_j for the j-th candidate in `order [Q, C]`, in which masked ones come last."""
    ordered = student.gather(-1, order)  # [Q, C]
    return ordered.flip(-1).logcumsumexp(dim=-1).flip(-1) - ordered
