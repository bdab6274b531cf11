"""Teachers: the scores of a step's candidates that distillation trains the dual head to follow.

`Match` and `MatchPlusSimilarity` use the scores of the model itself in this step; `Momentum` and `Frozen` have a model
of their own, which encodes the same images and captions. To add a teacher, subclass `Teacher` with a `__call__` that
returns scores `[2, G, 1 + K]` without gradient.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from loopitr.models.scoring import reranking_score
from loopitr.objective.parts import EncodedPairs

if TYPE_CHECKING:
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.objective.step import Step


class Teacher(ABC):
    """Scores the candidates of a step (`Step.candidates`) for the dual head to learn from.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import Distillation, LoopObjective, PartialRanking, Teacher
        >>> class HalfMatch(Teacher):
        ...     name = "half_match"
        ...
        ...     def __call__(self, step):
        ...         return 0.5 * step.match.scores.detach()
        >>> objective = LoopObjective(model, [Distillation(PartialRanking(), teacher=HalfMatch())])
        >>> list(objective(**batch).terms)
        ['distillation']
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, step: Step) -> Tensor:
        """Scores `[2, G, 1 + K]` of the candidates of all ranks, as in `MatchScores`, without gradient."""

    def held_out_score(self, scores: dict[str, float]) -> float | None:
        """This teacher's recall among the `scores` of a validation; None: it has its own model, evaluated separately.

        `scores` has mean R@1 by name: dual, match, reranked.
        """
        return None

    def after_step(self, model: LoopITRModel) -> None:  # noqa: B027  most teachers need nothing
        """Update the teacher after an optimiser step of `model`."""


class Match(Teacher):
    """The match scores of the model itself (LoopITR, arXiv 2203.05465).

    Example:
        >>> from loopitr import Distillation, Match, PartialRanking
        >>> Distillation(PartialRanking(), teacher=Match()).teacher.name
        'match'
    """

    name = "match"

    def __call__(self, step: Step) -> Tensor:
        return step.match.scores.detach()

    def held_out_score(self, scores: dict[str, float]) -> float | None:
        return scores.get("match")


class MatchPlusSimilarity(Teacher):
    """The reranking score of the model itself, which beats either head alone while the fusion head is little trained.

    Its similarity weight w is the one fitted by the last validation. With w above 1 the scores are divided by w, which
    keeps their order and puts them on the student's scale.

    Example:
        >>> from loopitr import Distillation, MatchPlusSimilarity, PartialRanking
        >>> Distillation(PartialRanking(), teacher=MatchPlusSimilarity()).teacher.name
        'match_plus_similarity'
    """

    name = "match_plus_similarity"

    def __call__(self, step: Step) -> Tensor:
        weight = step.model.config.similarity_weight
        match = step.match.scores.detach()
        scores = reranking_score(match, step.queries.student.detach(), weight) / max(1.0, weight)
        return scores.to(match.dtype)

    def held_out_score(self, scores: dict[str, float]) -> float | None:
        return scores.get("reranked")


class OwnModel(Teacher, nn.Module):
    """A teacher that gives the match scores of its own model, which gets no gradient.

    It is a submodule of the objective, so checkpoints contain it.
    """

    def __init__(self, model: LoopITRModel) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> OwnModel:
        """Does nothing: the model stays in eval mode."""
        return self

    @torch.no_grad()
    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, *, pixel_values: Tensor | None, image_tokens: Tensor | None
    ) -> EncodedPairs:
        """Encode a batch with the teacher's model; arguments as of `LoopObjective.forward`."""
        if pixel_values is not None:
            images = self.model.encode_images(pixel_values)
        else:
            assert image_tokens is not None
            images = self.model.image_state(image_tokens)
        return EncodedPairs(images, self.model.encode_texts(input_ids, attention_mask))

    @torch.no_grad()
    def __call__(self, step: Step) -> Tensor:
        own = step.teacher_states
        pairs = step.candidates.pairs  # [2, B, 1 + K, 2]
        scores = self.model.score_pairs(
            own.images, own.texts, pairs.flatten(0, 2), block_size=step.objective.pair_block
        ).score
        return step.gather_queries(scores.unflatten(0, pairs.shape[:3]))  # [2, G, 1 + K]


class Momentum(OwnModel):
    """An exponential moving average of the model (as in MoCo and ALBEF, arXiv 2107.07651).

    After each optimiser step every weight w of the teacher becomes `decay` w + (1 - `decay`) w of the model.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import Distillation, LoopObjective, Momentum, PartialRanking
        >>> teacher = Momentum(model, decay=0.99)
        >>> objective = LoopObjective(model, [Distillation(PartialRanking(), teacher=teacher)])
        >>> objective(**batch).loss.backward()  # and after the optimiser's step:
        >>> objective.after_step()
    """

    name = "momentum"

    def __init__(self, model: LoopITRModel, *, decay: float = 0.995) -> None:
        """
        Raises:
            ValueError: `decay` is below 0, or not below 1.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of a momentum teacher must be from 0 to below 1, got {decay}")
        super().__init__(copy.deepcopy(model))
        self.decay = decay

    @torch.no_grad()
    def after_step(self, model: LoopITRModel) -> None:
        own, others = list(self.model.parameters()), [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(own, others, 1 - self.decay)
        for buffer, other in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(other)


class Frozen(OwnModel):
    """The match scores of another model, which does not change: the setting of CPRD (arXiv 2407.07479).

    Example (`model`, `config` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import Distillation, Frozen, LoopITRModel, LoopObjective, PartialRanking
        >>> teacher = Frozen(LoopITRModel(config), student=model)
        >>> objective = LoopObjective(model, [Distillation(PartialRanking(), teacher=teacher)])
        >>> list(objective(**batch).terms)
        ['distillation']
    """

    name = "frozen"

    def __init__(self, model: LoopITRModel, *, student: LoopITRModel, source: str = "the frozen teacher") -> None:
        """
        Args:
            model: the teacher's model.
            student: the model to be trained; both get the same pixels and token ids.
            source: the name of the teacher in error messages.

        Raises:
            ValueError: the two differ in image size or vocabulary, or the teacher has NaN or infinite weights.
        """
        sizes = [each.config.vision["image_size"] for each in (model, student)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{source} takes images of {sizes[0]} pixels, the model of {sizes[1]}: they must be equal")
        words = [each.dual.text.model.get_input_embeddings().weight.shape[0] for each in (model, student)]
        if words[0] != words[1]:
            raise ValueError(f"{source} has a vocabulary of {words[0]}, the model of {words[1]}: they must be the same")
        broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
        if broken:
            raise ValueError(f"{source} holds NaN or infinite weights: {broken[0]}")
        super().__init__(model)
