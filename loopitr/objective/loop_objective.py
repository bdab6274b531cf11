"""`LoopObjective` encodes a batch and sums its losses: `terms.py` defines them, `step.py` computes what they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loopitr.models.outputs import TextFeatures
from loopitr.objective.contrastive_terms import Contrastive, SimilarityTerm
from loopitr.objective.metrics import step_metrics
from loopitr.objective.mining import Miner, TopK
from loopitr.objective.no_gradient import without_gradient
from loopitr.objective.parts import Embeds, Encoded, MaskedTexts, StepOutput
from loopitr.objective.step import Step
from loopitr.objective.teachers import OwnModel, Teacher
from loopitr.objective.terms import Distillation, Matching, Term, TermOutput

if TYPE_CHECKING:
    from loopitr.models.loop_model import LoopITRModel


class LoopObjective(nn.Module):
    """The losses of a batch for a model. It contains the model, so DDP or FSDP wrap this one module.

    Example:
        >>> import torch
        >>> from loopitr import Contrastive, LoopITRConfig, LoopITRModel, LoopObjective, Matching, Ranking, TopK
        >>> config = LoopITRConfig(
        ...     vision={"name": "test_vit", "image_size": 32},
        ...     text={"model_type": "bert", "vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2},
        ...     fusion={"num_layers": 1, "num_heads": 4},
        ... )
        >>> model = LoopITRModel(config)
        >>> batch = {
        ...     "pixel_values": torch.randn(3, 3, 32, 32),
        ...     "input_ids": torch.tensor([[2, 7, 3], [2, 8, 3], [2, 9, 3]]),
        ...     "attention_mask": torch.ones(3, 3, dtype=torch.long),
        ...     "identities": torch.arange(3),
        ...     "caption_ids": torch.arange(3),
        ... }
        >>> objective = LoopObjective(model, terms=[Contrastive(), Matching(), Ranking(0.5)], miner=TopK(1))
        >>> step = objective(**batch)
        >>> step.loss.backward()
        >>> list(step.terms)
        ['itc', 'itm', 'lce']
    """

    def __init__(
        self,
        model: LoopITRModel,
        terms: Sequence[Term] | None = None,
        *,
        miner: Miner | None = None,
        mine_across_ranks: bool = False,
        pair_block: int | None = None,
        sum_dropout: float | None = None,
    ) -> None:
        """
        Args:
            terms: the losses, from `terms.py` or your own; None: contrastive and matching. Terms of weight 0 are
                dropped.
            miner: chooses the hard negatives; None: the 4 most similar.
            mine_across_ranks: mine in the batch of all ranks, whose tokens are then gathered, not in this rank's.
            pair_block: the number of pairs scored at a time (`score_pairs`); None: all.
            sum_dropout: train the fusion head on match score + similarity / temperature, without the similarity for
                this share of the queries; None: train it on the match score alone.

        Raises:
            ValueError: two terms have one name, the model lacks a head that a term needs, or a term trains on more
                negatives than the miner chooses.
        """
        super().__init__()
        self.model = model
        self.terms = [term for term in ([Contrastive(), Matching()] if terms is None else terms) if term.weight]
        self.miner = miner or TopK(4)
        self.mine_across_ranks, self.pair_block, self.sum_dropout = mine_across_ranks, pair_block, sum_dropout
        self.own_teacher = next((term.teacher for term in self.terms if isinstance(term.teacher, OwnModel)), None)
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"terms must have different names, got {', '.join(names)}")
        mined = self.miner.num_negatives
        for term in self.terms:
            term.check(model)
            if (wanted := term.trained_negatives(mined)) > mined:
                raise ValueError(f"the term {term.name} trains on {wanted} negatives, but the miner chooses {mined}")

    @property
    def uses_pairs(self) -> bool:
        """Whether a term asks for match scores."""
        return any(term.uses_pairs for term in self.terms)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher of the distillation; None without distillation."""
        return next((term.teacher for term in self.terms if term.teacher is not None), None)

    @property
    def teacher_margin(self) -> float | None:
        """The lead in points of R@1 that the teacher must have for distillation to be on; None: it is always on."""
        return next((term.margin for term in self.terms if isinstance(term, Distillation)), None)

    def after_step(self) -> None:
        """Keep temperatures within their limits and update a momentum teacher; call this after every optimiser step."""
        self.model.dual.limit_scale()
        if self.model.agreement is not None:
            self.model.agreement.limit_scale()
        if self.teacher is not None:
            self.teacher.after_step(self.model)

    @property
    def predicts_words(self) -> bool:
        """Whether a term asks for predicted words."""
        return any(term.masking is not None for term in self.terms)

    @property
    def trains_projections_apart(self) -> bool:
        """Whether the gradient of the distillation is kept from the backbones."""
        return any(isinstance(term, Distillation) and not term.backbones for term in self.terms)

    @property
    def matryoshka_dims(self) -> tuple[int, ...] | None:
        """The lengths to which embeds may be cut, since these prefixes are trained too, in ascending order.

        None: no term trains the similarities.
        """
        return next((tuple(sorted({*t.dims})) for t in self.terms if isinstance(t, SimilarityTerm)), None)

    @property
    def compares_tokens(self) -> bool:
        """Whether a term asks for the agreement of tokens."""
        return any(term.compares_tokens for term in self.terms)

    @property
    def trained_negatives(self) -> int:
        """How many of a query's K negatives the fusion head is trained on; the scores of the others only teach."""
        return max((term.trained_negatives(self.miner.num_negatives) for term in self.terms), default=0)

    def forward(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        identities: Tensor,
        caption_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_tokens: Tensor | None = None,
        text_tokens: Tensor | None = None,
        text_pooled: Tensor | None = None,
        distillation_scale: float = 1.0,
        with_pairs: bool = True,
    ) -> StepOutput:
        """Losses of one batch of `B` image-caption pairs.

        Args:
            input_ids, attention_mask: `[B, L]`.
            identities: `[B]` int64: rows with the same number show the same image.
            caption_ids: `[B]` int64: rows with the same number carry the same caption.
            pixel_values: `[B, 3, S, S]`.
            image_tokens: `[B, N, D]`, the output of a frozen image backbone, in place of `pixel_values`.
            text_tokens, text_pooled: `[B, L, D]` and `[B, D']`, the output of a frozen text backbone (`TextFeatures`),
                which then runs only for masked captions.
            distillation_scale: a factor on the weight of the distillation, for its warm-up; 0 leaves it out.
            with_pairs: False leaves out the terms that score pairs, while the dual head trains alone.

        Raises:
            ValueError: neither `pixel_values` nor `image_tokens` is given.
        """
        encoded = self.encode(
            input_ids,
            attention_mask,
            pixel_values=pixel_values,
            image_tokens=image_tokens,
            text_tokens=text_tokens,
            text_pooled=text_pooled,
            with_teacher=with_pairs and distillation_scale > 0,
        )
        return self.compare(
            encoded, identities, caption_ids, distillation_scale=distillation_scale, with_pairs=with_pairs
        )

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_tokens: Tensor | None = None,
        text_tokens: Tensor | None = None,
        text_pooled: Tensor | None = None,
        with_teacher: bool = True,
    ) -> Encoded:
        """Run each backbone once, unless its tokens are given; arguments as of `forward`.

        The text backbone reads the captions and, for word prediction, their masked copies in one run. A teacher with
        a model of its own encodes the batch too, unless `with_teacher` is False.
        """
        if pixel_values is not None:
            images = self.model.encode_images(pixel_values)
        elif image_tokens is not None:
            images = self.model.image_state(image_tokens)
        else:
            raise ValueError("a batch needs pixel_values or image_tokens")
        features = None
        if text_tokens is not None and text_pooled is not None:
            features = TextFeatures(pooled=text_pooled, tokens=text_tokens)
        masking = next((term.masking for term in self.terms if term.masking is not None), None)
        teacher = None
        if self.own_teacher is not None and with_teacher:
            teacher = self.own_teacher.encode(
                input_ids, attention_mask, pixel_values=pixel_values, image_tokens=image_tokens
            )
        masked = None
        if masking is not None:
            masked_ids, labels = masking(input_ids, attention_mask)
            if features is None:  # One run of the backbone reads both.
                both = self.model.text_features(torch.cat([input_ids, masked_ids]), attention_mask.repeat(2, 1))
                features, of_masked = (
                    TextFeatures(pooled=pooled, tokens=tokens)
                    for pooled, tokens in zip(both.pooled.chunk(2), both.tokens.chunk(2), strict=True)
                )
            else:
                of_masked = self.model.text_features(masked_ids, attention_mask)
            masked = MaskedTexts(self.model.text_state(of_masked, attention_mask), labels)
        elif features is None:
            features = self.model.text_features(input_ids, attention_mask)
        texts = self.model.text_state(features, attention_mask)
        student = None
        if self.trains_projections_apart:
            dual = self.model.dual
            pooled_texts = features.pooled.detach().to(dual.logit_scale.dtype)  # as `text_state` converts cached ones
            with without_gradient():  # A backbone's own pooling may have weights.
                pooled_images = dual.vision.pool(images.tokens)
            student = Embeds(dual.embed_pooled_images(pooled_images), dual.embed_pooled_texts(pooled_texts))
        return Encoded(images, texts, masked, teacher, student)

    def compare(
        self,
        encoded: Encoded,
        identities: Tensor,
        caption_ids: Tensor,
        *,
        distillation_scale: float = 1.0,
        with_pairs: bool = True,
    ) -> StepOutput:
        """The losses of encoded pairs; arguments as of `forward`.

        Raises:
            ValueError: a term asks for match scores, and no term says so by `uses_pairs`: they would have no gradient.
        """
        step = Step(self, encoded, identities, caption_ids, distillation_scale=distillation_scale)
        outputs: dict[str, TermOutput] = {}
        loss = self._zero_of_unused(step, with_pairs=with_pairs)
        for term in self.terms:
            if (with_pairs or not term.uses_pairs) and (weight := term.weight_in(step)):
                output = term(step)
                if not self.uses_pairs and "match" in vars(step):
                    raise ValueError(f"the term {term.name!r} asks for match scores: give it uses_pairs = True")
                output = output if isinstance(output, TermOutput) else TermOutput(output)
                outputs[term.name] = output
                loss = loss + weight * output.loss
        metrics = step_metrics(step)
        for output in outputs.values():
            metrics |= output.metrics
        return StepOutput(loss, {name: output.loss for name, output in outputs.items()}, metrics)

    def _zero_of_unused(self, step: Step, *, with_pairs: bool) -> Tensor:
        """Zero, attached to every trained parameter that this step's terms may not use: DDP waits for each gradient."""
        parameters = [] if self.model.dual.logit_bias is None else [self.model.dual.logit_bias]
        if self.uses_pairs and not with_pairs:
            heads = (self.model.fusion, self.model.itm_head, self.model.agreement)
            parameters += [parameter for head in heads if head is not None for parameter in head.parameters()]
        zero = step.similarities.per_image.sum() * 0  # A step without any term still has a loss to differentiate.
        return sum((parameter.sum() * 0 for parameter in parameters if parameter.requires_grad), zero)
