"""Terms that transfer the structure of one modality to the other (arXiv 2405.03355), where only one has labels."""

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
    """CMD: similarities within the other modality learn from those within the `source` modality (`losses.cmd_loss`).

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
    """CMC: InfoNCE against the embeds of the `source` modality, which gets no gradient (`losses.cmc_loss`).

    Of several rows with the same image or the same caption only the first is used, so that none is a false negative.

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
    """The embeds `[G, E]` of the source, detached, and of the other modality."""
    images, texts = step.embeds.images, step.embeds.texts
    return (images.detach(), texts) if source == "image" else (texts.detach(), images)


def _first(ids: Tensor) -> Tensor:
    """`[G]` bool: whether no earlier row has the same id."""
    ordered, order = ids.sort(stable=True)  # rows of one id together, the earliest first
    changes = torch.ones_like(ordered, dtype=torch.bool)
    changes[1:] = ordered[1:] != ordered[:-1]
    return torch.zeros_like(changes).scatter(0, order, changes)
