"""The metrics that a step logs with its losses, from the parts that its terms have asked for; without gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopitr.objective import losses

if TYPE_CHECKING:
    from loopitr.objective.step import Step


@torch.no_grad()
def step_metrics(step: Step) -> dict[str, Tensor]:
    """The temperature, the mean similarity within each modality and, where pairs are scored, the accuracy of the
    fusion head and how far the two heads rank candidates alike."""
    metrics = {"temperature": 1 / step.model.dual.scale}
    for side, embeds in (("image", step.embeds.images), ("text", step.embeds.texts)):
        metrics[f"{side}_similarity"] = _mean_cosine(embeds)
    if "match" in step.__dict__:  # A cached property is there once a term has asked for it.
        match = step.match
        trained = 1 + (step.objective.trained_negatives or step.objective.miner.num_negatives)
        metrics["itm_accuracy"] = losses.itm_accuracy(*match.as_pairs(trained))
        metrics |= _rank_agreement(*(x.flatten(0, 1)[:, 1:] for x in (match.student, match.scores, match.valid)))
    return metrics


def _mean_cosine(embeds: Tensor) -> Tensor:
    """The mean over all pairs of different rows of unit vectors `[B, E]`; 0 with one row.

    Near 1 the embeds have collapsed: all are alike.
    """
    count = len(embeds)
    return (embeds.sum(0).square().sum() - count) / max(1, count * (count - 1))


def _rank_agreement(student: Tensor, teacher: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Kendall's tau over the negatives `[Q, K]` of each query, and separately over the hard and the easy ones."""
    metrics = {"rank_agreement": losses.kendall_tau(student, teacher, valid)}
    if valid.shape[1] > 2:  # Of two negatives one is hard and one easy: neither has an order.
        hard = losses.hard_above_mean(teacher, valid)
        for name, part in (("hard", hard), ("easy", valid & ~hard)):
            metrics[f"rank_agreement_{name}"] = losses.kendall_tau(student, teacher, part)
    return metrics
