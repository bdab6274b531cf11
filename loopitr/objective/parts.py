"""The named outputs of the parts of a training step (`step.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loopitr.models.outputs import ImageState, TextState


@dataclass(frozen=True)
class StepOutput:
    """The weighted sum `loss`, to be differentiated; the unweighted losses `terms` by name; `metrics` for the log."""

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Encoded:
    """An encoded batch: all that the losses need of it.

    Attributes:
        teacher: the same batch, encoded by a teacher's model.
        student: the embeds of the same batch for a distillation that trains the dual head's projections alone: their
            gradient does not reach the backbones. None: the distillation trains the backbones too.
    """

    images: ImageState
    texts: TextState
    masked: MaskedTexts | None = None
    teacher: EncodedPairs | None = None
    student: Embeds | None = None


@dataclass(frozen=True)
class EncodedPairs:
    """A batch encoded by a teacher that has a model of its own."""

    images: ImageState
    texts: TextState


@dataclass(frozen=True)
class MaskedTexts:
    """The encoded masked captions, and `labels [B, L]`: the original ids of masked tokens, -100 elsewhere."""

    state: TextState
    labels: Tensor


@dataclass(frozen=True)
class Gathered:
    """`identities [G]` and `caption_ids [G]` of the pairs of all ranks, in rank order."""

    identities: Tensor
    caption_ids: Tensor


@dataclass(frozen=True)
class Embeds:
    """Unit vectors with gradient, of one rank or of all in rank order: `images` and `texts [B, E]`; row i is a pair."""

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
    """Bool masks of the positives among the pairs of `Similarities` and `Agreements`, `[B, G]` each."""

    per_image: Tensor
    per_text: Tensor


@dataclass(frozen=True)
class Candidates:
    """The candidates of each query: its positive, then its K hard negatives.

    The first axis is the direction: 0 for images that look for texts, 1 for texts that look for images.

    Attributes:
        images, texts: the encoded images and texts that were mined from.
        pairs: `[2, B, 1 + K, 2]`, (image, text) indices into them.
        valid: `[2, B, 1 + K]` bool, false in the slots of a query that has fewer than K negatives.
        student: `[2, B, 1 + K]`, similarity / temperature.
    """

    images: ImageState
    texts: TextState
    pairs: Tensor
    valid: Tensor
    student: Tensor


@dataclass(frozen=True)
class Queries:
    """The dual head's scores of the candidates of all ranks, in both directions as in `Candidates`.

    `valid [2, G, 1 + K]` bool; `student [2, G, 1 + K]`, similarity / temperature.
    """

    valid: Tensor
    student: Tensor


@dataclass(frozen=True)
class MatchScores:
    """The fusion head's scores of the candidates of all ranks, in both directions as in `Candidates`.

    `logits [2, G, 1 + K, 2]` (no match, match); `valid` and `student` as in `Queries`.
    """

    logits: Tensor
    valid: Tensor
    student: Tensor

    @property
    def scores(self) -> Tensor:
        """Match scores (log-odds) `[2, G, 1 + K]`."""
        return self.logits[..., 1] - self.logits[..., 0]

    def as_pairs(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `count` candidates of every query as pairs: logits `[P, 2]`, matching and valid `[P]` bool.

        A positive pair occurs in both directions and is valid in only one of them.
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


def occur_together(queries: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """`[B, G]` bool: whether some row of all ranks holds both the id of query i and the id of candidate j.

    `queries [B]` are ids of the same kind as `query_ids [G]`; row j of `query_ids` and `candidate_ids [G]` is a pair.
    """
    ordered, order = candidate_ids.sort()
    group = torch.empty_like(order)
    group[order] = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)  # [G] candidates of one id have one number
    same = (queries[:, None] == query_ids).to(torch.float32)  # [B, G]
    groups = torch.zeros_like(same).index_add_(1, group, same) > 0  # [B, G] whether a row of query i is in the group
    return groups.index_select(1, group)
