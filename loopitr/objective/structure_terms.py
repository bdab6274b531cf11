"""Terms that carry the structure of one modality into the other (arXiv 2405.03355), for data without labels of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from loopitr.objective import losses
from loopitr.objective.terms import Term

if TYPE_CHECKING:
    from loopitr.objective.step import Step


@dataclass(frozen=True)
class StructureTransfer(Term):
    """CMD: the batch's similarities within the `source` modality teach those within the other (`losses.cmd_loss`).

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import LoopObjective, StructureTransfer
        >>> list(LoopObjective(model, [StructureTransfer(source="text")])(**batch).terms)
        ['cmd']
    """

    weight: float = 1.0
    source: Literal["image", "text"] = "image"
    name = "cmd"

    def __call__(self, step: Step) -> Tensor:
        source, target = _source_and_target(step, self.source)
        return losses.cmd_loss(source, target)


@dataclass(frozen=True)
class FrozenContrast(Term):
    """CMC: each embed picks its own among those of the `source` modality, which gets no gradient (`losses.cmc_loss`).

    Only the first of several rows that show one image, or carry one caption, counts: the others are no negatives.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import FrozenContrast, LoopObjective
        >>> list(LoopObjective(model, [FrozenContrast(source="image")])(**batch).terms)
        ['cmc']
    """

    weight: float = 1.0
    source: Literal["image", "text"] = "image"
    name = "cmc"

    def __call__(self, step: Step) -> Tensor:
        source, target = _source_and_target(step, self.source)
        first = _first(step.gathered.identities) & _first(step.gathered.caption_ids)  # [G]
        return losses.cmc_loss(source, target, valid=first)


def _source_and_target(step: Step, source: str) -> tuple[Tensor, Tensor]:
    """Embeds `[G, E]` of the modality that teaches, detached, and of the one that learns."""
    images, texts = step.embeds.images, step.embeds.texts
    return (images.detach(), texts) if source == "image" else (texts.detach(), images)


def _first(ids: Tensor) -> Tensor:
    """`[G]` bool: whether no earlier row has the same id."""
    ordered, order = ids.sort(stable=True)  # rows of one id together, the earliest first
    changes = torch.ones_like(ordered, dtype=torch.bool)
    changes[1:] = ordered[1:] != ordered[:-1]
    return torch.zeros_like(changes).scatter(0, order, changes)
