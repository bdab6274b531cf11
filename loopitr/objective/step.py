"""One training step of LoopITR (arXiv 2203.05465), from an encoded batch to all that its losses are computed from.

`Step` follows the paper from top to bottom:

1. The dual head compares every image with every text of the batch (`similarities`, `positives`).
2. Its similarities choose hard negatives for each query (`candidates`; the rules are in `mining.py`).
3. The fusion head scores the positive and the hard negatives of each query (`match`).

The contrastive loss trains the dual head on 1, the matching loss trains the fusion head on 3, and distillation closes
the loop: the dual head's similarities of the candidates learn from the fusion head's scores of them, without gradient
(of partial rankings: CPRD, arXiv 2407.07479). The terms in `terms.py` are these losses; `LoopObjective` encodes the
batch, with one run of each backbone, and sums the terms.

Every loss is computed from scores gathered over ranks: `distributed.py` says why that gives the gradient of one
process on the concatenated batch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from loopitr.distributed import all_gather, rank, rows_of_ranks, world_size
from loopitr.objective import losses
from loopitr.objective.gathering import gather_images, gather_texts
from loopitr.objective.losses.means import at_least_float32
from loopitr.objective.no_gradient import without_gradient
from loopitr.objective.parts import (
    Agreements,
    Candidates,
    Embeds,
    Encoded,
    EncodedPairs,
    Gathered,
    MatchScores,
    Positives,
    PredictedWords,
    Queries,
    Similarities,
    occur_together,
)

if TYPE_CHECKING:
    from loopitr.models.outputs import ImageState, TextState
    from loopitr.objective.loop_objective import LoopObjective


class Step:
    """The parts of one training step. Each is computed when a term first asks for it, and only once.

    `B` is the number of image-caption pairs on this rank, `G` that on all ranks; each query has its positive and `K`
    hard negatives as candidates. `distillation_scale` multiplies the weight of the distillation in this step.
    """

    def __init__(
        self,
        objective: LoopObjective,
        encoded: Encoded,
        identities: Tensor,
        caption_ids: Tensor,
        *,
        distillation_scale: float = 1.0,
    ) -> None:
        self.objective, self.model, self.encoded = objective, objective.model, encoded
        self.identities, self.caption_ids = identities, caption_ids
        self.distillation_scale = distillation_scale

    # 1. The dual head compares images with texts.

    @cached_property
    def similarities(self) -> Similarities:
        """This rank's queries against the candidates of all ranks, divided by the temperature."""
        return self._compare(self._own_embeds, self.embeds)

    def similarities_at(self, dim: int) -> Similarities:
        """Like `similarities`, from the first `dim` dimensions of the embeds, normalised again."""
        return self._compare(self._own_embeds, self.embeds, dim)

    @cached_property
    def student(self) -> Similarities:
        """`similarities` as the distillation trains them: perhaps without a gradient to the backbones."""
        own = self.encoded.student
        return self.similarities if own is None else self._compare(own, self._gathered(own))

    def _compare(self, own: Embeds, candidates: Embeds, dim: int | None = None) -> Similarities:
        def vectors(x: Tensor) -> Tensor:
            x = at_least_float32(x)
            return x if dim is None else F.normalize(x[:, :dim], dim=-1)

        with torch.autocast(own.images.device.type, enabled=False):  # In bfloat16, close candidates would tie.
            scale = at_least_float32(self.model.dual.scale)
            return Similarities(
                per_image=scale * vectors(own.images) @ vectors(candidates.texts).T,  # [B, G]
                per_text=scale * vectors(own.texts) @ vectors(candidates.images).T,  # [B, G]
            )

    @cached_property
    def positives(self) -> Positives:
        """Text j is a positive of image i if some row of any rank pairs i's image with j's caption."""
        identities, captions = self.gathered.identities, self.gathered.caption_ids
        return Positives(
            per_image=occur_together(self.identities, identities, captions),
            per_text=occur_together(self.caption_ids, captions, identities),
        )

    # 2. Its similarities choose hard negatives.

    @cached_property
    def candidates(self) -> Candidates:
        """Each query's positive and hard negatives, mined on this rank or, with `mine_across_ranks`, on all ranks."""
        size = len(self.identities)
        if self.objective.mine_across_ranks:
            columns, first = slice(None), self.start
            images, texts = gather_images(self._images, self.rows), self._all_texts
        else:
            columns, first = slice(self.start, self.start + size), 0
            images, texts = self._images, self.encoded.texts
        own = torch.arange(first, first + size, device=self.identities.device)  # [B] each query's own row in these
        to_texts, valid_texts, text_student = self._mine(
            self.similarities.per_image[:, columns],
            self.positives.per_image[:, columns],
            own,
            self.gathered.caption_ids[columns],
            self.student.per_image[:, columns],
        )
        to_images, valid_images, image_student = self._mine(
            self.similarities.per_text[:, columns],
            self.positives.per_text[:, columns],
            own,
            self.gathered.identities[columns],
            self.student.per_text[:, columns],
        )
        queries = own[:, None].expand_as(to_texts)
        pairs = [torch.stack([queries, to_texts], -1), torch.stack([to_images, queries], -1)]  # [B, 1 + K, 2] each
        return Candidates(
            images=images,
            texts=texts,
            pairs=torch.stack(pairs),
            valid=torch.stack([valid_texts, valid_images]),
            student=torch.stack([text_student, image_student]),
        )

    def _mine(
        self, similarity: Tensor, positives: Tensor, own: Tensor, groups: Tensor, student: Tensor
    ) -> tuple[Tensor, ...]:
        """Index, validity and similarity of one direction's candidates, `[B, 1 + K]` each."""
        mined = self.objective.miner(similarity.detach(), positives, groups)
        # A masked slot repeats the positive pair, which costs nothing: repeated pairs are scored once.
        negatives = torch.where(mined.valid, mined.indices, own[:, None])
        indices = torch.cat([own[:, None], negatives], 1)  # [B, 1 + K]
        valid = torch.cat([torch.ones_like(mined.valid[:, :1]), mined.valid], 1)  # [B, 1 + K]
        return indices, valid, student.gather(1, indices)

    @cached_property
    def queries(self) -> Queries:
        """The dual head's similarities of the candidates, of the queries of all ranks."""
        return Queries(self.gather_queries(self.candidates.valid), self.gather_queries(self.candidates.student))

    # 3. The fusion head scores the candidates.

    @cached_property
    def match(self) -> MatchScores:
        """The fusion head's scores of the candidates, of the queries of all ranks.

        The scores of negatives that no term trains on (`trained_negatives`) only teach, and have no gradient.
        """
        candidates, trained = self.candidates, self.objective.trained_negatives
        count = candidates.pairs.shape[2]
        if trained == 0:
            with without_gradient():
                logits = self._score(candidates, slice(None))
        elif 1 + trained == count:
            logits = self._score(candidates, slice(None))
        else:
            if self.objective.pair_block is None:  # Both calls below then share one projection of the images.
                candidates = replace(candidates, images=self.model.project_images(candidates.images))
            with without_gradient():
                only_teach = self._score(candidates, slice(1 + trained, None))
            logits = torch.cat([self._score(candidates, slice(1 + trained)), only_teach], 2)
        return MatchScores(self.gather_queries(logits), self.queries.valid, self.queries.student)

    def _score(self, candidates: Candidates, part: slice) -> Tensor:
        """ITM logits `[2, B, C, 2]` of `part` of each query's candidates."""
        pairs = candidates.pairs[:, :, part]
        scored = self.model.score_pairs(
            candidates.images, candidates.texts, pairs.flatten(0, 2), block_size=self.objective.pair_block
        )
        return scored.logits.unflatten(0, pairs.shape[:3])

    @cached_property
    def trained_match(self) -> MatchScores:
        """The scores that the matching losses train: `match`, or with `sum_dropout` its sum with the similarities.

        On the sum, the fusion head learns to correct the dual head. The similarities are divided by the temperature
        and have no gradient. They are left out for a share of the queries (`sum_dropout`), so that the fusion head
        does not come to rely on them: they are better on training data than on new data.
        """
        share = self.objective.sum_dropout
        if share is None:
            return self.match
        draw = torch.rand(2, len(self.identities), 1, device=self.identities.device)
        kept = self.gather_queries(draw) >= share  # [2, G, 1]
        added = (self.match.student.detach() * kept).to(self.match.logits.dtype)  # [2, G, 1 + K]
        return replace(self.match, logits=self.match.logits + F.pad(added[..., None], (1, 0)))

    # What only some terms and teachers ask for.

    @cached_property
    def words(self) -> PredictedWords:
        """The words that the fusion head predicts for this rank's masked captions, each read with its own image."""
        masked, head = self.encoded.masked, self.model.mlm_head
        assert masked is not None and head is not None, "words need a term with `masking` and a model with an mlm_head"
        pairs = torch.arange(len(masked.labels)).repeat(2, 1).T  # [B, 2]
        fused = self.model.fused_tokens(self._images, masked.state, pairs)  # [tokens, D]
        labels, real = masked.labels.flatten(), masked.state.mask.flatten()  # [B * L]
        chosen = ((labels != losses.IGNORE_INDEX) & real).nonzero().squeeze(1)  # the only wait for the device
        rows = (real.cumsum(0) - 1).index_select(0, chosen)  # of the fused tokens, which have no padding
        words = self.model.dual.text.model.get_input_embeddings().weight
        return PredictedWords(logits=head(fused.index_select(0, rows), words), labels=labels.index_select(0, chosen))

    @cached_property
    def agreement(self) -> Agreements:
        """The token agreement of all pairs of all ranks; each rank computes that of its own images."""
        per_image = self.model.agreement_of_all(self._images, self._all_texts)  # [B, G]
        per_text = self.gather(per_image)[:, self.start : self.start + len(per_image)].T  # [B, G]
        return Agreements(per_image, per_text)

    @cached_property
    def teacher_states(self) -> EncodedPairs:
        """The batch as encoded by the teacher's own model, of all ranks where candidates are mined across them."""
        own = self.encoded.teacher
        assert own is not None
        if not self.objective.mine_across_ranks:
            return own
        return EncodedPairs(gather_images(own.images, self.rows), gather_texts(own.texts, self.rows))

    @cached_property
    def _images(self) -> ImageState:
        """The encoded images, with those projections that several parts of the step would otherwise each compute."""
        objective, images, agreement = self.objective, self.encoded.images, self.model.agreement
        if objective.predicts_words and objective.pair_block is None:
            return self.model.project_images(images)  # keys and values of the fusion head, and regions
        if objective.compares_tokens and agreement is not None:
            return replace(images, regions=agreement.project_regions(images.tokens))
        return images

    # The batch of all ranks.

    @cached_property
    def rows(self) -> list[int]:
        """The number of pairs `B` on each rank."""
        return rows_of_ranks(self.identities)

    @property
    def start(self) -> int:
        """The position of this rank's first pair among those of all ranks."""
        return sum(self.rows[: rank()])

    @property
    def share(self) -> float:
        """The factor that makes the average over ranks of means over `B` queries the mean over all `G` queries.

        It is 1 where all ranks have the same number of pairs.
        """
        return len(self.identities) * world_size() / sum(self.rows)

    def gather(self, x: Tensor, *, gradient: bool = True) -> Tensor:
        """`[B, ...]` -> `[G, ...]`."""
        return all_gather(x, gradient=gradient, rows=self.rows)

    def gather_queries(self, x: Tensor) -> Tensor:
        """`[2, B, ...]` -> `[2, G, ...]`, with gradient."""
        return self.gather(x.transpose(0, 1)).transpose(0, 1)

    @cached_property
    def gathered(self) -> Gathered:
        """The identities and caption ids of all ranks."""
        return Gathered(self.gather(self.identities), self.gather(self.caption_ids))

    @cached_property
    def embeds(self) -> Embeds:
        """The embeds of all ranks, with gradient."""
        return self._gathered(self._own_embeds)

    @property
    def _own_embeds(self) -> Embeds:
        return Embeds(self.encoded.images.embeds, self.encoded.texts.embeds)

    def _gathered(self, own: Embeds) -> Embeds:
        return Embeds(self.gather(at_least_float32(own.images)), self.gather(at_least_float32(own.texts)))

    @cached_property
    def _all_texts(self) -> TextState:
        return gather_texts(self.encoded.texts, self.rows)
