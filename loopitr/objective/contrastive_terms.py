"""The terms that train the dual head's similarities, at its whole width and, where asked for, at prefixes of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopitr.objective import losses
from loopitr.objective.parts import Similarities
from loopitr.objective.terms import Term

if TYPE_CHECKING:
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.objective.step import Step


class SimilarityTerm(Term):
    """A loss of similarities. `dims`: also of the first so many dimensions of the embeds, of unit length again.

    It is the mean of one loss for each of `dims` and one for the whole width (Matryoshka Representation Learning,
    arXiv 2205.13147), all at one temperature, so that vectors can be cut to any of `dims`.
    """

    dims: Sequence[int]

    @abstractmethod
    def of(self, step: Step, similarities: Similarities) -> Tensor:
        """The loss at one width, of this rank's queries."""

    def __call__(self, step: Step) -> Tensor:
        width = step.model.config.embed_dim
        values = [self.of(step, step.similarities)]
        values += [self.of(step, step.similarities_at(dim)) for dim in sorted({*self.dims} - {width})]
        return step.share * torch.stack(values).mean()

    def check(self, model: LoopITRModel) -> None:
        width, name = model.config.embed_dim, "objective.matryoshka_dims"
        for dim in self.dims:
            if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= width:
                raise ValueError(f"{name} must be from 1 to the model's {width} dimensions, got {dim}")


@dataclass(frozen=True)
class Contrastive(SimilarityTerm):
    """ITC: symmetric InfoNCE of the dual head's similarities, with all positives of a query (`losses.itc_loss`).

    `dims`: at the first so many dimensions, too (`SimilarityTerm`).

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import Contrastive, LoopObjective
        >>> list(LoopObjective(model, [Contrastive(dims=(64, 128))])(**batch).terms)
        ['itc']
    """

    weight: float = 1.0
    dims: Sequence[int] = ()
    name = "itc"

    def of(self, step: Step, similarities: Similarities) -> Tensor:
        positives = step.positives
        return losses.itc_loss(similarities.per_image, similarities.per_text, positives.per_image, positives.per_text)


@dataclass(frozen=True)
class SigmoidContrastive(SimilarityTerm):
    """Each image-text pair of the batch by itself (`losses.siglip_loss`); needs a model with a logit bias.

    `dims`: at the first so many dimensions, too (`SimilarityTerm`).

    Example (`config` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import LoopITRModel, LoopObjective, SigmoidContrastive
        >>> config.initial_logit_bias = -10.0
        >>> list(LoopObjective(LoopITRModel(config), [SigmoidContrastive()])(**batch).terms)
        ['itc']
    """

    weight: float = 1.0
    dims: Sequence[int] = ()
    name = "itc"

    def of(self, step: Step, similarities: Similarities) -> Tensor:
        bias = step.model.dual.logit_bias
        assert bias is not None
        per_image = similarities.per_image
        return losses.siglip_loss(per_image + bias.to(per_image.dtype), step.positives.per_image)

    def check(self, model: LoopITRModel) -> None:
        super().check(model)
        if model.dual.logit_bias is None:
            raise ValueError("objective.itc_loss 'sigmoid' needs a model with a logit_bias (model.logit_bias -10)")
