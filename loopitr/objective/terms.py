"""The losses of a step: each term has a name and a weight, and is called on the step (`step.py`).

A term asks the step for what it needs (`similarities`, `positives`, `candidates`, `match`, `words`, `embeds`,
`agreement`), which the step computes once. To add a loss, subclass `Term` with a `__call__` that returns a scalar, as
`recipes/examples/own_term.py` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from loopitr.checks import check_at_least
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
    """What a term returns: the scalar `loss`, not yet weighted, and `metrics` for the log.

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

    Attributes:
        name: the name in the log.
        weight: the factor in the total; a term of weight 0 is left out.
        uses_pairs: whether it asks for match scores. They have a gradient unless it overrides `trained_negatives`. Such
            a term is left out while the dual head trains alone.
        compares_tokens: whether it asks for token agreement.
        masking: hides words of the captions; the masked copies are `step.encoded.masked`.
        teacher: gives the scores that it learns from (`teachers.py`).

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
        """The mean loss over the queries of all ranks.

        A term that computes only this rank's mean returns it times `step.share`: averaged over ranks, that is the mean
        over all queries.
        """

    def weight_in(self, step: Step) -> float:
        """The weight in this step. Override it for a weight that changes during the run."""
        return self.weight

    def trained_negatives(self, num_negatives: int) -> int:
        """How many of a query's `num_negatives` need match scores with gradient; all, if the term asks for scores."""
        return num_negatives if self.uses_pairs else 0

    def check(self, model: LoopITRModel) -> None:  # noqa: B027  most terms need nothing
        """Raise a ValueError if `model` lacks what this term needs."""


@dataclass(frozen=True)
class Matching(Term):
    """ITM: two-way cross entropy of the fusion head, match or no match, on each query's candidates.

    `balanced` gives positives and negatives half of the loss each. `negatives` is the number of negatives to train on,
    the first that were mined; None: all.

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

    def __post_init__(self) -> None:
        check_at_least(1, negatives=self.negatives)

    def __call__(self, step: Step) -> Tensor:
        loss = losses.balanced_itm_loss if self.balanced else losses.itm_loss
        return loss(*step.trained_match.as_pairs(1 + self.trained_negatives(step.objective.miner.num_negatives)))

    def trained_negatives(self, num_negatives: int) -> int:
        return self.negatives or num_negatives


@dataclass(frozen=True)
class Ranking(Term):
    """LCE: ranks each query's positive above its negatives by match score (`losses.lce_loss`).

    `negatives` is the number of negatives to train on, the first that were mined; None: all.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import LoopObjective, Ranking
        >>> list(LoopObjective(model, [Ranking(0.5)])(**batch).terms)
        ['lce']
    """

    weight: float = 1.0
    negatives: int | None = None
    name = "lce"
    uses_pairs = True

    def __post_init__(self) -> None:
        check_at_least(1, negatives=self.negatives)

    def __call__(self, step: Step) -> Tensor:
        count = 1 + self.trained_negatives(step.objective.miner.num_negatives)
        match = step.trained_match
        scores, valid = match.scores[..., :count], match.valid[..., :count]  # [2, G, count]
        return losses.lce_loss(scores.flatten(0, 1), valid.flatten(0, 1))

    def trained_negatives(self, num_negatives: int) -> int:
        return self.negatives or num_negatives


class Distillation(Term):
    """The dual head's similarities of a query's candidates learn from a teacher's scores of the same candidates.

    Args:
        loss: a function `(student, teacher, valid) -> scalar` on `[Q, 1 + K]`, the positive first, or a
            `DistillationLoss` such as `PartialRanking()` (CPRD, arXiv 2407.07479).
        teacher: scores the candidates (`teachers.py`); None: the detached match scores (LoopITR, arXiv 2203.05465).
        backbones: whether it trains the backbones too, not only the dual head's projections.
        margin: the lead over the dual head, in points of held-out R@1, that the teacher must have for the distillation
            to be on (`training/gate.py`); None: it is always on.

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
        backbones: bool = True,
        margin: float | None = None,
    ) -> None:
        self.loss = loss if isinstance(loss, DistillationLoss) else WholeList(loss)
        self.weight = weight
        self.teacher: Teacher = teacher or Match()
        self.backbones, self.margin = backbones, margin

    def __call__(self, step: Step) -> TermOutput:
        student, valid, teacher = step.queries.student, step.queries.valid, self.teacher(step)  # [2, G, 1 + K] each
        ranked = [self.loss.ranked(teacher[side], valid[side]) for side in (0, 1)]
        image_loss, text_loss = (
            self.loss.of_ranked(student[side], teacher[side], valid[side], ranked[side]) for side in (0, 1)
        )
        image_length, text_length = (mask.sum(1).float().mean() for mask in ranked)
        lengths = {"valid_length": (image_length + text_length) / 2}  # ranked candidates per query
        return TermOutput((image_loss + text_loss) / 2, lengths)

    def weight_in(self, step: Step) -> float:
        return self.weight * step.distillation_scale

    def trained_negatives(self, num_negatives: int) -> int:
        return 0  # It trains the dual head alone.


@dataclass(frozen=True)
class WordPrediction(Term):
    """MLM on the fused tokens of masked captions: the fusion head learns which word belongs to which region.

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
        # Ranks have different numbers of masked tokens; with this factor, the average over ranks is that over tokens.
        count = torch.ones_like(words.labels).sum()
        return losses.mlm_loss(words.logits, words.labels) * count * world_size() / all_sum(count).clamp(min=1)

    def check(self, model: LoopITRModel) -> None:
        if model.mlm_head is None or self.masking is None:
            raise ValueError("objective.mlm needs a model with an mlm_head and a tokenizer with a mask token")


@dataclass(frozen=True)
class Agreement(Term):
    """Symmetric InfoNCE of token agreement (`models/agreement.py`) over all pairs of the batch.

    Token agreement is a part of the match score that is cheap enough to compute for every pair.

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
