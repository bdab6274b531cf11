"""Contrastive terms on the dual head's similarities, of the whole embeds and optionally of prefixes of them."""

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
    """A loss on similarities, of the whole embeds and of their prefixes of `dims` dimensions, normalised again.

    The loss is the mean over the prefixes and the whole width, all at one temperature (Matryoshka Representation
    Learning, arXiv 2205.13147). Trained vectors can be cut to any of `dims`.
    """

    dims: Sequence[int]

    @abstractmethod
    def of(self, step: Step, similarities: Similarities) -> Tensor:
        """The mean loss over this rank's queries, of similarities at one width."""

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

    `dims` are prefixes of the embeds to train too (Matryoshka, arXiv 2205.13147).

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
    """Sigmoid loss of each image-text pair of the batch (`losses.siglip_loss`); needs a model with a logit bias.

    `dims` are prefixes of the embeds to train too (Matryoshka, arXiv 2205.13147).

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
