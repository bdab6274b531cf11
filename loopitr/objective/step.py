"""One training step: encode, gather, mine, score (LoopITR, arXiv 2203.05465). What it is trained on is in `terms.py`.

The dual head's similarities choose each query's hard negatives (`mining.py`). The fusion head scores the positive and
the negatives: that is its own loss (ITM) and, detached, the teacher of the dual's similarities of the same candidates
(distillation; of partial rankings: CPRD, arXiv 2407.07479). So the two heads make each other better in one step, with
each backbone run once.

Every loss is computed from scores gathered over ranks: see `distributed.py` for why that is the gradient of one
process on the concatenated batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from loopitr.distributed import all_gather, all_gather_padded, rank, rows_of_ranks, world_size
from loopitr.objective import losses
from loopitr.objective.losses.means import at_least_float32
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
)

if TYPE_CHECKING:
    from loopitr.models.outputs import ImageState, TextState
    from loopitr.objective.loop_objective import LoopObjective


class Step:
    """One encoded batch between the two heads. Each part is computed when a term first asks for it, and once.

    `B` are this rank's pairs, `G` those of all ranks; `K` the negatives that the miner is asked for.
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

    @cached_property
    def rows(self) -> list[int]:
        """B of each rank."""
        return rows_of_ranks(self.identities)

    @property
    def start(self) -> int:
        """Where this rank's rows begin among those of all ranks."""
        return sum(self.rows[: rank()])

    @property
    def share(self) -> float:
        """What the mean over this rank's queries is to be multiplied by, so that the mean over ranks is that over all
        queries: 1 where all ranks have as many."""
        return len(self.identities) * world_size() / sum(self.rows)

    def gather(self, x: Tensor, *, gradient: bool = True) -> Tensor:
        """`[B, ...]` -> `[G, ...]`."""
        return all_gather(x, gradient=gradient, rows=self.rows)

    def gather_queries(self, x: Tensor) -> Tensor:
        """`[2, B, ...]` -> `[2, G, ...]`, with gradient."""
        return self.gather(x.transpose(0, 1)).transpose(0, 1)

    @cached_property
    def gathered(self) -> Gathered:
        return Gathered(self.gather(self.identities), self.gather(self.caption_ids))

    @cached_property
    def embeds(self) -> Embeds:
        images, texts = self.encoded.images.embeds, self.encoded.texts.embeds
        return Embeds(self.gather(at_least_float32(images)), self.gather(at_least_float32(texts)))

    @cached_property
    def similarities(self) -> Similarities:
        """Local queries against the candidates of all ranks, divided by the temperature."""
        return self._compared(lambda embeds: embeds)

    def similarities_at(self, dim: int) -> Similarities:
        """The same of the first `dim` dimensions of the embeds, of unit length again."""
        return self._compared(lambda embeds: F.normalize(embeds[:, :dim], dim=-1))

    def _compared(self, form: Callable[[Tensor], Tensor]) -> Similarities:
        images, texts = self.encoded.images.embeds, self.encoded.texts.embeds
        with torch.autocast(images.device.type, enabled=False):  # bf16 would tie close candidates
            scale = at_least_float32(self.model.dual.scale)
            return Similarities(
                per_image=scale * form(at_least_float32(images)) @ form(self.embeds.texts).T,  # [B, G]
                per_text=scale * form(at_least_float32(texts)) @ form(self.embeds.images).T,  # [B, G]
            )

    @cached_property
    def agreement(self) -> Agreements:
        """The token agreement of all pairs of all ranks; each rank computes that of its own images."""
        per_image = self.model.agreement_of_all(self._projected, self._all_texts)  # [B, G]
        per_text = self.gather(per_image)[:, self.start : self.start + len(per_image)].T  # [B, G]
        return Agreements(per_image, per_text)

    @cached_property
    def positives(self) -> Positives:
        """Text j is a positive of image i if some row of any rank shows i's image with j's caption."""
        identities, captions = self.gathered.identities, self.gathered.caption_ids
        return Positives(
            per_image=_shown_together(self.identities, identities, captions),
            per_text=_shown_together(self.caption_ids, captions, identities),
        )

    @cached_property
    def candidates(self) -> Candidates:
        """Each query's positive and hard negatives, mined in the batch of this rank or, if asked for, of all ranks."""
        size = len(self.identities)
        start, columns = self.start, slice(None)
        images, texts = self._projected, self.encoded.texts
        if self.objective.mine_across_ranks:
            images, texts = _gather_images(images, self.rows), self._all_texts
        else:
            start, columns = 0, slice(start, start + size)
        own = torch.arange(start, start + size, device=self.identities.device)  # [B] each query's partner
        to_texts, valid_texts, text_student = self._mine(
            self.similarities.per_image[:, columns],
            self.positives.per_image[:, columns],
            own,
            self.gathered.caption_ids[columns],
        )
        to_images, valid_images, image_student = self._mine(
            self.similarities.per_text[:, columns],
            self.positives.per_text[:, columns],
            own,
            self.gathered.identities[columns],
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

    @cached_property
    def queries(self) -> Queries:
        """The candidates of all ranks, as the dual head sees them."""
        return Queries(self.gather_queries(self.candidates.valid), self.gather_queries(self.candidates.student))

    @cached_property
    def match(self) -> MatchScores:
        """The fusion head's scores of the candidates of all ranks, without gradient where they only teach."""
        candidates, trained = self.candidates, self.objective.trained_negatives
        count = candidates.pairs.shape[2]
        if trained == 0:
            with torch.no_grad():
                logits = self._score(candidates, slice(None))
        elif 1 + trained == count:
            logits = self._score(candidates, slice(None))
        else:
            if self.objective.pair_block is None:  # one projection for both
                candidates = replace(candidates, images=self.model.project_images(candidates.images))
            with torch.no_grad():
                only_teach = self._score(candidates, slice(1 + trained, None))
            logits = torch.cat([self._score(candidates, slice(1 + trained)), only_teach], 2)
        return MatchScores(self.gather_queries(logits), self.queries.valid, self.queries.student)

    @cached_property
    def trained_match(self) -> MatchScores:
        """What the fusion head is trained on: its scores or, if the objective says so, their sum with the similarities.

        On the sum it learns the correction that the dual head needs. The similarities, divided by the temperature and
        without gradient, are left out for a share of the queries, so that the head does not come to lean on them: they
        are better in training than on new data.
        """
        share = self.objective.sum_dropout
        if share is None:
            return self.match
        drawn = torch.rand(2, len(self.identities), 1, device=self.identities.device)
        kept = self.gather_queries(drawn) >= share  # [2, G, 1]
        added = (self.match.student.detach() * kept).to(self.match.logits.dtype)  # [2, G, 1 + K]
        return replace(self.match, logits=self.match.logits + F.pad(added[..., None], (1, 0)))

    @cached_property
    def teacher_states(self) -> EncodedPairs:
        """The batch as the teacher's own model sees it, of all ranks where candidates are mined across them."""
        own = self.encoded.teacher
        assert own is not None
        if not self.objective.mine_across_ranks:
            return own
        return EncodedPairs(_gather_images(own.images, self.rows), _gather_texts(own.texts, self.rows))

    @cached_property
    def words(self) -> PredictedWords:
        """The word predictions of this rank's masked captions, each read with its own image."""
        masked, head = self.encoded.masked, self.model.mlm_head
        assert masked is not None and head is not None
        pairs = torch.arange(len(masked.labels)).repeat(2, 1).T  # [B, 2] each caption with its own image
        fused = self.model.fused_tokens(self._projected, masked.state, pairs)  # [tokens, D]
        labels = masked.labels[masked.state.mask]  # [tokens]
        chosen = labels != losses.IGNORE_INDEX
        words = self.model.dual.text.model.get_input_embeddings().weight
        return PredictedWords(logits=head(fused[chosen], words), labels=labels[chosen])

    @cached_property
    def _projected(self) -> ImageState:
        """The images, with their keys and values where several runs of the fusion head share them, and likewise the
        regions that token agreement looks at."""
        objective, images, agreement = self.objective, self.encoded.images, self.model.agreement
        if objective.predicts_words and objective.pair_block is None:  # otherwise `score_pairs` projects what it needs
            return self.model.project_images(images)
        if objective.compares_tokens and agreement is not None:
            return replace(images, regions=agreement.project_regions(images.tokens))
        return images

    @cached_property
    def _all_texts(self) -> TextState:
        return _gather_texts(self.encoded.texts, self.rows)

    def _mine(self, similarity: Tensor, positives: Tensor, own: Tensor, groups: Tensor) -> tuple[Tensor, ...]:
        """Indices, validity and similarity `[B, 1 + K]` each of one direction's candidates."""
        mined = self.objective.miner(similarity.detach(), positives, groups)
        # A masked slot repeats the positive pair, which costs nothing: repeated pairs are scored once.
        negatives = torch.where(mined.valid, mined.indices, own[:, None])
        indices = torch.cat([own[:, None], negatives], 1)  # [B, 1 + K]
        valid = torch.cat([torch.ones_like(mined.valid[:, :1]), mined.valid], 1)  # [B, 1 + K]
        return indices, valid, similarity.gather(1, indices)

    def _score(self, candidates: Candidates, part: slice) -> Tensor:
        """ITM logits `[2, B, C, 2]` of `part` of each query's candidates."""
        pairs = candidates.pairs[:, :, part]
        scored = self.model.score_pairs(
            candidates.images, candidates.texts, pairs.flatten(0, 2), block_size=self.objective.pair_block
        )
        return scored.logits.unflatten(0, pairs.shape[:3])


def _gather_images(images: ImageState, rows: list[int]) -> ImageState:
    """Tokens of all ranks, with gradient. Keys and values are projected later, of the images in this rank's pairs."""
    if world_size() == 1:
        return images
    embeds, tokens = all_gather(images.embeds, rows=rows), all_gather(images.tokens, gradient=True, rows=rows)
    return type(images)(embeds=embeds, tokens=tokens)


def _gather_texts(texts: TextState, rows: list[int]) -> TextState:
    """Tokens of all ranks, with gradient."""
    if world_size() == 1:
        return texts
    mask = all_gather_padded(texts.mask.long(), rows=rows).bool()
    tokens = all_gather_padded(texts.tokens, gradient=True, rows=rows)
    return type(texts)(all_gather(texts.embeds, rows=rows), tokens, mask)


def _shown_together(queries: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """`[B, G]`: whether some row of `own`, `others [G]` holds query i (an id among `own`) with the candidate j's id."""
    ordered, order = others.sort()
    group = torch.empty_like(order)
    group[order] = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)  # [G] one number for each id, from 0
    same = (queries[:, None] == own).to(torch.float32)  # [B, G]
    groups = torch.zeros_like(same).index_add_(1, group, same) > 0  # [B, G] whether a row of query i is in the group
    return groups.index_select(1, group)
