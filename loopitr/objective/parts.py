"""What the parts of a training step hand to each other (`step.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
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
class Encoded:
    """What the backbones make of a batch: all that the losses need of it."""

    images: ImageState
    texts: TextState
    masked: MaskedTexts | None = None
    teacher: EncodedPairs | None = None


@dataclass(frozen=True)
class EncodedPairs:
    """A batch as a teacher with a model of its own sees it."""

    images: ImageState
    texts: TextState


@dataclass(frozen=True)
class MaskedTexts:
    """The masked captions' state and, at masked tokens, the original ids: `labels [B, L]`, -100 elsewhere."""

    state: TextState
    labels: Tensor


@dataclass(frozen=True)
class Gathered:
    """`identities [G]` and `caption_ids [G]` of the pairs of all ranks, in rank order."""

    identities: Tensor
    caption_ids: Tensor


@dataclass(frozen=True)
class Embeds:
    """Unit vectors of all ranks, in rank order, with gradient: `images [G, E]` and `texts [G, E]`, row i a pair."""

    images: Tensor
    texts: Tensor


@dataclass(frozen=True)
class Similarities:
    """Similarity / temperature: images against all texts `[B, G]`, texts against all images `[B, G]`."""

    per_image: Tensor
    per_text: Tensor


@dataclass(frozen=True)
class Agreements:
    """Token agreement: images of this rank against all texts `[B, G]`, its texts against all images `[B, G]`."""

    per_image: Tensor
    per_text: Tensor


@dataclass(frozen=True)
class Positives:
    """Masks `[B, G]` bool that go with `Similarities` and `Agreements`: images against all texts, texts against all
    images."""

    per_image: Tensor
    per_text: Tensor


@dataclass(frozen=True)
class Candidates:
    """What each query is compared with: its positive, then its K hard negatives.

    The first axis is the direction: 0 images that look for texts, 1 texts that look for images. `pairs
    [2, B, 1 + K, 2]` are (image, text) indices into `images` and `texts`, the states mined from; `valid
    [2, B, 1 + K]` is false where a query has fewer negatives; `student [2, B, 1 + K]` is similarity / temperature.
    """

    images: ImageState
    texts: TextState
    pairs: Tensor
    valid: Tensor
    student: Tensor


@dataclass(frozen=True)
class Queries:
    """The dual head's view of the candidates of all ranks, directions as in `Candidates`.

    `valid [2, G, 1 + K]`, `student [2, G, 1 + K]`: similarity / temperature.
    """

    valid: Tensor
    student: Tensor


@dataclass(frozen=True)
class MatchScores:
    """The cross head's view of the candidates of all ranks, directions as in `Candidates`.

    `logits [2, G, 1 + K, 2]` (no match, match), `valid [2, G, 1 + K]`, `student [2, G, 1 + K]`.
    """

    logits: Tensor
    valid: Tensor
    student: Tensor

    @property
    def scores(self) -> Tensor:
        """Match scores (log-odds) `[2, G, 1 + K]`."""
        return self.logits[..., 1] - self.logits[..., 0]

    def as_pairs(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[P, 2]`, matching and valid `[P]` bool of the first `count` candidates of every query.

        The positives are the same pairs in both directions: they are valid once.
        """
        valid = self.valid[..., :count].clone()
        valid[1, :, 0] = False
        matching = torch.zeros_like(valid)
        matching[..., 0] = True
        return self.logits[..., :count, :].flatten(0, 2), matching.flatten(), valid.flatten()


@dataclass(frozen=True)
class PredictedWords:
    """`logits [M, V]` and `labels [M]` of this rank's M masked tokens."""

    logits: Tensor
    labels: Tensor
