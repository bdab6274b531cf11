"""What the parts of a training step hand to each other (`objective.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from loopitr.models.outputs import ImageState, TextState


@dataclass(frozen=True)
class StepOutput:
    """`loss`: weighted sum, what to differentiate. `terms`: each loss by name, unweighted. `metrics`: for the log."""

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Candidates:
    """One direction's queries and what each is compared with, its positive first.

    `indices [B, 1 + K]` into the batch mined from, `valid [B, 1 + K]`, `student [B, 1 + K]` similarity / temperature.
    """

    indices: Tensor
    valid: Tensor
    student: Tensor


@dataclass(frozen=True)
class Encoded:
    """What the backbones make of a batch: all that the losses need of it."""

    images: ImageState
    texts: TextState
    masked: MaskedTexts | None = None


@dataclass(frozen=True)
class Similarities:
    """Similarity / temperature: images against all texts `[B, R B]`, texts against all images `[B, R B]`."""

    per_image: Tensor
    per_text: Tensor


@dataclass(frozen=True)
class Positives:
    """Masks that go with `Similarities`: images against all texts, texts against all images, `[B, R B]` bool each."""

    per_image: Tensor
    per_text: Tensor


@dataclass(frozen=True)
class MaskedTexts:
    """The masked captions' state and, at masked tokens, the original ids: `labels [B, L]`, -100 elsewhere."""

    state: TextState
    labels: Tensor
