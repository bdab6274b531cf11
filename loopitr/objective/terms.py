"""What a step is trained on: small objects, each with a name, a weight and a call on the step (`step.py`).

A term asks the step for what it needs (`similarities`, `positives`, `candidates`, `match`, `words`, `embeds`,
`agreement`), which the step computes once. A term of your own is a subclass with a `__call__` that returns a scalar:
see `recipes/examples/own_term.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from loopitr.distributed import all_sum, world_size
from loopitr.objective import losses
from loopitr.objective.losses.distillation import DistillationLoss, WholeList
from loopitr.objective.teachers import Match, Teacher

if TYPE_CHECKING:
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.objective.step import Step
    from loopitr.objective.word_masking import TokenMasking


@dataclass(frozen=True)
class TermOutput:
    """A scalar `loss`, not weighted, and `metrics` for the log.

    Example:
        >>> import torch
        >>> from loopitr import TermOutput
        >>> TermOutput(torch.tensor(2.0), {"closest": torch.tensor(0.5)}).loss
        tensor(2.)
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Term(ABC):
    """One loss of the step.

    `name` is what it is called in the log; `weight` its factor in the total, 0: left out. `uses_pairs` says that it
    asks for match scores, so that it is left out while the dual head trains alone; `compares_tokens` that it asks for
    the agreement of tokens, which the step has from its start. `masking` hides words of the
    captions, whose copies then are in `step.encoded.masked`; `teacher` is whom it learns from (`teachers.py`).

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import Contrastive, LoopObjective, Term
        >>> class Sharpness(Term):
        ...     name, weight = "sharpness", 0.01
        ...
        ...     def __call__(self, step):
        ...         return step.similarities.per_image.square().mean()
        >>> list(LoopObjective(model, [Contrastive(), Sharpness()])(**batch).terms)
        ['itc', 'sharpness']
    """

    name: ClassVar[str]
    weight: float
    uses_pairs: ClassVar[bool] = False
    compares_tokens: ClassVar[bool] = False
    masking: TokenMasking | None = None

    teacher: Teacher | None = None

    @abstractmethod
    def __call__(self, step: Step) -> Tensor | TermOutput:
        """The loss of the whole batch, or this rank's share of it, whose mean over ranks is that: `step.share` times
        the mean over this rank's queries."""

    def weight_in(self, step: Step) -> float:
        """The weight in this step; the same in every step unless a term says otherwise."""
        return self.weight

    def trained_negatives(self, num_negatives: int) -> int:
        """How many of a query's negatives need match scores with gradient."""
        return 0

    def check(self, model: LoopITRModel) -> None:  # noqa: B027  most terms need nothing
        """Raise a ValueError if `model` lacks what this term needs."""


@dataclass(frozen=True)
class Matching(Term):
    """ITM: does the pair match? Two-way cross entropy of the fusion head on each query's candidates.

    `balanced` gives positives and negatives one half each. `negatives`: train on only so many, the first mined.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import LoopObjective, Matching
        >>> list(LoopObjective(model, [Matching(negatives=1)])(**batch).terms)
        ['itm']
    """

    weight: float = 1.0
    balanced: bool = True
    negatives: int | None = None
    name = "itm"
    uses_pairs = True

    def __call__(self, step: Step) -> Tensor:
        loss = losses.balanced_itm_loss if self.balanced else losses.itm_loss
        return loss(*step.trained_match.as_pairs(1 + self.trained_negatives(step.objective.miner.num_negatives)))

    def trained_negatives(self, num_negatives: int) -> int:
        return self.negatives or num_negatives


@dataclass(frozen=True)
class Ranking(Term):
    """LCE: each query's positive above its own negatives by match score (`losses.lce_loss`).

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import LoopObjective, Ranking
        >>> list(LoopObjective(model, [Ranking(0.5)])(**batch).terms)
        ['lce']
    """

    weight: float = 1.0
    negatives: int | None = None
    name = "lce"
    uses_pairs = True

    def __call__(self, step: Step) -> Tensor:
        count = 1 + self.trained_negatives(step.objective.miner.num_negatives)
        match = step.trained_match
        scores, valid = match.scores[..., :count], match.valid[..., :count]  # [2, G, count]
        return losses.lce_loss(scores.flatten(0, 1), valid.flatten(0, 1))

    def trained_negatives(self, num_negatives: int) -> int:
        return self.negatives or num_negatives


class Distillation(Term):
    """A teacher's scores of a query's candidates teach the dual's similarities of the same candidates.

    `loss` is a function `(student, teacher, valid) -> scalar` on `[Q, 1 + K]`, the positive first, or a
    `DistillationLoss`, such as `PartialRanking()` (CPRD). `teacher` (`teachers.py`) scores the candidates; None: the
    detached match scores. With a `margin` a run lets it count only while the teacher is ahead of the dual head by so
    many points of held-out R@1 (`training/gate.py`).

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import Distillation, LoopObjective, PartialRanking
        >>> list(LoopObjective(model, [Distillation(PartialRanking())])(**batch).terms)
        ['distillation']
    """

    name = "distillation"
    uses_pairs = True

    def __init__(
        self,
        loss: DistillationLoss | Callable[[Tensor, Tensor, Tensor], Tensor],
        weight: float = 1.0,
        *,
        teacher: Teacher | None = None,
        margin: float | None = None,
    ) -> None:
        self.loss = loss if isinstance(loss, DistillationLoss) else WholeList(loss)
        self.weight = weight
        self.teacher: Teacher = teacher or Match()
        self.margin = margin

    def __call__(self, step: Step) -> TermOutput:
        student, valid, teacher = step.queries.student, step.queries.valid, self.teacher(step)  # [2, G, 1 + K] each
        ranked = [self.loss.ranked(teacher[side], valid[side]) for side in (0, 1)]
        image_loss, text_loss = (
            self.loss.of_ranked(student[side], teacher[side], valid[side], ranked[side]) for side in (0, 1)
        )
        image_length, text_length = (mask.sum(1).float().mean() for mask in ranked)
        lengths = {"valid_length": (image_length + text_length) / 2}  # candidates per query that were ranked
        return TermOutput((image_loss + text_loss) / 2, lengths)

    def weight_in(self, step: Step) -> float:
        return self.weight * step.distillation_scale


@dataclass(frozen=True)
class WordPrediction(Term):
    """MLM on the fused tokens of masked captions: it teaches the fusion head which word belongs to which region.

    Example (`config` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import LoopITRModel, LoopObjective, WordPrediction, token_masking
        >>> from loopitr.models.processing import word_tokenizer
        >>> config.mlm_head = True
        >>> masking = token_masking(word_tokenizer(["a", "red", "dog"], max_length=8), 0.3)
        >>> list(LoopObjective(LoopITRModel(config), [WordPrediction(masking)])(**batch).terms)
        ['mlm']
    """

    masking: TokenMasking | None = None
    weight: float = 1.0
    name = "mlm"

    def __call__(self, step: Step) -> Tensor:
        words = step.words
        # Ranks hold different numbers of masked tokens: weigh so that the average over ranks is the mean over tokens.
        count = torch.ones_like(words.labels).sum()
        return losses.mlm_loss(words.logits, words.labels) * count * world_size() / all_sum(count).clamp(min=1)

    def check(self, model: LoopITRModel) -> None:
        if model.mlm_head is None or self.masking is None:
            raise ValueError("objective.mlm needs a model with an mlm_head and a tokenizer with a mask token")


@dataclass(frozen=True)
class Agreement(Term):
    """Symmetric InfoNCE of token agreement, the cheap part of the match score, over all pairs of the batch.

    It trains from the first step on: unlike match scores, it costs little enough for every pair.

    Example (`config` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import Agreement, LoopITRModel, LoopObjective
        >>> config.fusion["agreement"] = 16
        >>> list(LoopObjective(LoopITRModel(config), [Agreement()])(**batch).terms)
        ['agreement']
    """

    weight: float = 1.0
    name = "agreement"
    compares_tokens = True

    def __call__(self, step: Step) -> Tensor:
        agreement, positives = step.agreement, step.positives
        return step.share * losses.itc_loss(
            agreement.per_image, agreement.per_text, positives.per_image, positives.per_text
        )

    def check(self, model: LoopITRModel) -> None:
        if model.agreement is None:
            raise ValueError("objective.agreement needs a model with token agreement (model.fusion.agreement true)")
