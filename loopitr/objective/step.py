"""One training step as one module: encode, gather, mine, score, named losses (LoopITR, arXiv 2203.05465).

The dual head's similarities choose each query's hard negatives (`mining.py`); the fusion head scores the positive and
the negatives, which is its own loss (ITM) and, detached, the teacher of the dual's similarities of the same candidates
(distillation; of partial rankings: CPRD, arXiv 2407.07479). So the two heads make each other better in one step, with
each backbone run once.

Every loss is computed from scores gathered over ranks: see `distributed.py` for why that is the gradient of one
process on the concatenated batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loopitr.distributed import all_gather, all_gather_padded, all_sum, rank, world_size
from loopitr.objective import losses
from loopitr.objective.mining import Mined
from loopitr.objective.options import DISTILLATION, MINING, ObjectiveOptions
from loopitr.objective.parts import Candidates, Encoded, MaskedTexts, Positives, Similarities, StepOutput
from loopitr.objective.word_masking import TokenMasking

if TYPE_CHECKING:
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.models.outputs import ImageState, TextState


class LoopObjective(nn.Module):
    """The step's losses for a model; the model's parameters are this module's, so DDP or FSDP wrap one thing."""

    def __init__(
        self,
        model: LoopITRModel,
        options: ObjectiveOptions | None = None,
        *,
        token_masking: TokenMasking | None = None,
        pair_block: int | None = None,
    ) -> None:
        """`pair_block`: pairs scored at a time (`score_pairs`); None: all."""
        super().__init__()
        self.model = model
        self.options = options or ObjectiveOptions()
        self.token_masking = token_masking
        self.pair_block = pair_block
        if self.options.mlm > 0 and (model.mlm_head is None or token_masking is None):
            raise ValueError("objective.mlm needs a model with an mlm_head and a tokenizer with a mask token")
        if self.options.itc > 0 and self.options.itc_loss == "sigmoid" and model.dual.logit_bias is None:
            raise ValueError("objective.itc_loss 'sigmoid' needs a model with a logit_bias (model.logit_bias -10)")

    def forward(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        identities: Tensor,
        caption_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_tokens: Tensor | None = None,
        distillation_scale: float = 1.0,
        with_pairs: bool = True,
    ) -> StepOutput:
        """Losses of one batch of `B` image-caption pairs.

        Args:
            input_ids, attention_mask: `[B, L]`.
            identities: `[B]` int64: rows with the same number show the same image.
            caption_ids: `[B]` int64: rows with the same number carry the same caption.
            pixel_values: `[B, 3, S, S]`, or instead `image_tokens [B, N, D]` of a frozen backbone.
            distillation_scale: factor on the weight of the distillation (its warm-up).
            with_pairs: False leaves matching and distillation out, while the dual head trains alone.
        """
        encoded = self.encode(input_ids, attention_mask, pixel_values=pixel_values, image_tokens=image_tokens)
        return self.compare(
            encoded, identities, caption_ids, distillation_scale=distillation_scale, with_pairs=with_pairs
        )

    def compare(
        self,
        encoded: Encoded,
        identities: Tensor,
        caption_ids: Tensor,
        *,
        distillation_scale: float = 1.0,
        with_pairs: bool = True,
    ) -> StepOutput:
        """The losses of encoded pairs; arguments as of `forward`."""
        options, model = self.options, self.model
        image_state, text_state, masked = encoded.images, encoded.texts, encoded.masked
        similarity = self._similarities(image_state.embeds, text_state.embeds)
        positives = self._positives(identities, caption_ids)
        terms: dict[str, Tensor] = {}
        metrics = {"temperature": 1 / model.dual.scale.detach()}
        if options.itc > 0:
            terms["itc"] = self._contrastive(similarity, positives)
        if options.mlm > 0 and self.pair_block is None:  # used twice; otherwise `score_pairs` projects what it needs
            image_state = model.project_images(image_state)
        zero = similarity.per_image.sum() * 0  # a loss even when every weight is zero
        if model.dual.logit_bias is not None:  # DDP wants a gradient of every trained parameter
            zero = zero + model.dual.logit_bias * 0
        if options.scores_pairs and with_pairs:
            self._matching(image_state, text_state, similarity, positives, identities, caption_ids, terms, metrics)
        elif options.scores_pairs:  # DDP again
            pair_head = (*model.fusion.parameters(), *model.itm_head.parameters())
            zero = sum((p.sum() * 0 for p in pair_head if p.requires_grad), zero)
        if masked is not None:
            terms["mlm"] = self._mlm(image_state, masked)
        weights = {name: getattr(options, name) for name in terms}
        if "distillation" in weights:
            weights["distillation"] *= distillation_scale
        return StepOutput(sum((weights[name] * terms[name] for name in terms), zero), terms, metrics)

    # 1. Encode

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> Encoded:
        """One run of each backbone; arguments as of `forward`."""
        if pixel_values is not None:
            images = self.model.encode_images(pixel_values)
        elif image_tokens is not None:
            images = self.model.image_state(image_tokens)
        else:
            raise ValueError("a batch needs pixel_values or image_tokens")
        return Encoded(images, *self._encode_texts(input_ids, attention_mask))

    def _encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[TextState, MaskedTexts | None]:
        """Captions and, for MLM, their masked copies in the same run of the backbone."""
        if self.options.mlm == 0 or self.token_masking is None:
            return self.model.encode_texts(input_ids, attention_mask), None
        changed, labels = self.token_masking(input_ids, attention_mask)
        both = self.model.encode_texts(torch.cat([input_ids, changed]), attention_mask.repeat(2, 1))
        size = len(input_ids)
        state = type(both)(both.embeds[:size], both.tokens[:size], both.mask[:size])
        return state, MaskedTexts(type(both)(both.embeds[size:], both.tokens[size:], both.mask[size:]), labels)

    # 2. Gather

    def _similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Similarities:
        """Local queries against the candidates of all ranks, divided by the temperature."""
        with torch.autocast(image_embeds.device.type, enabled=False):  # bf16 would tie close candidates
            image_embeds, text_embeds, scale = image_embeds.float(), text_embeds.float(), self.model.dual.scale.float()
            return Similarities(
                per_image=scale * image_embeds @ all_gather(text_embeds, gradient=True).T,  # [B, R B]
                per_text=scale * text_embeds @ all_gather(image_embeds, gradient=True).T,  # [B, R B]
            )

    def _positives(self, identities: Tensor, caption_ids: Tensor) -> Positives:
        """Text j is a positive of image i if some row of any rank shows i's image with j's caption."""
        all_identities, all_captions = all_gather(identities), all_gather(caption_ids)  # [G]
        return Positives(
            per_image=_shown_together(identities, all_identities, all_captions),
            per_text=_shown_together(caption_ids, all_captions, all_identities),
        )

    def _contrastive(self, similarity: Similarities, positives: Positives) -> Tensor:
        """This rank's share: its queries, whose average over ranks is the loss of the whole batch."""
        if self.options.itc_loss == "softmax":
            return losses.itc_loss(similarity.per_image, similarity.per_text, positives.per_image, positives.per_text)
        bias = self.model.dual.logit_bias
        assert bias is not None
        return losses.siglip_loss(similarity.per_image + bias.float(), positives.per_image)

    # 3. - 6. Mine, score, teach

    def _matching(
        self,
        image_state: ImageState,
        text_state: TextState,
        similarity: Similarities,
        positives: Positives,
        identities: Tensor,
        caption_ids: Tensor,
        terms: dict[str, Tensor],
        metrics: dict[str, Tensor],
    ) -> None:
        options = self.options
        size = len(identities)
        start = rank() * size
        columns = slice(None)
        if options.mine_across_ranks:
            image_state, text_state = self._gather_states(image_state, text_state)
        else:  # the batch mined from is this rank's
            columns = slice(start, start + size)
            start = 0
        own = torch.arange(start, start + size, device=identities.device)  # [B] each query's partner
        all_identities, all_captions = all_gather(identities)[columns], all_gather(caption_ids)[columns]
        per_image, per_text = similarity.per_image[:, columns], similarity.per_text[:, columns]  # [B, C]
        to_text = self._candidates(per_image, positives.per_image[:, columns], own, all_captions)
        to_image = self._candidates(per_text, positives.per_text[:, columns], own, all_identities)

        queries = own[:, None].expand_as(to_text.indices)
        image_side = torch.stack([queries, to_text.indices], -1)  # [B, 1 + K, 2]
        text_side = torch.stack([to_image.indices, queries], -1)  # [B, 1 + K, 2]
        pairs = torch.stack([image_side, text_side])  # [2, B, 1 + K, 2]
        logits = _gather_queries(self._score(image_state, text_state, pairs))  # [2, R B, 1 + K, 2]
        valid = _gather_queries(torch.stack([to_text.valid, to_image.valid]))  # [2, R B, 1 + K]
        student = _gather_queries(torch.stack([to_text.student, to_image.student]))  # [2, R B, 1 + K]

        trained = options.trained_candidates
        counted = valid[..., :trained].clone()
        counted[1, :, 0] = False  # the positives are the same pairs in both directions
        matching = torch.zeros_like(counted)
        matching[..., 0] = True
        flat = logits[..., :trained, :].flatten(0, 2), matching.flatten(), counted.flatten()
        metrics["itm_accuracy"] = losses.itm_accuracy(*flat)
        if options.itm > 0:
            matching_loss = losses.balanced_itm_loss if options.balance_itm else losses.itm_loss
            terms["itm"] = matching_loss(*flat)

        scores = logits[..., 1] - logits[..., 0]  # [2, R B, 1 + K] match scores
        if options.lce > 0:
            terms["lce"] = losses.lce_loss(scores[..., :trained].flatten(0, 1), valid[..., :trained].flatten(0, 1))

        teacher = scores.detach()  # [2, R B, 1 + K]
        negatives = [x.flatten(0, 1)[:, 1:] for x in (student.detach(), teacher, valid)]
        metrics["rank_agreement"] = losses.kendall_tau(*negatives)
        if options.distillation > 0:
            distil = DISTILLATION[options.distillation_loss]
            taught = [distil(student[side], teacher[side], valid[side], options) for side in (0, 1)]
            terms["distillation"] = (taught[0].loss + taught[1].loss) / 2
            metrics["valid_length"] = (taught[0].valid_length + taught[1].valid_length) / 2

    def _score(self, images: ImageState, texts: TextState, pairs: Tensor) -> Tensor:
        """ITM logits `[2, B, 1 + K, 2]` of `pairs [2, B, 1 + K, 2]`, without gradient where they only teach."""

        def score(images: ImageState, texts: TextState, pairs: Tensor) -> Tensor:
            scored = self.model.score_pairs(images, texts, pairs.flatten(0, 2), block_size=self.pair_block)
            return scored.logits.unflatten(0, pairs.shape[:3])

        if not self.options.trains_scores:
            with torch.no_grad():
                return score(images, texts, pairs)
        if not self.options.teaches_alone:
            return score(images, texts, pairs)
        if self.pair_block is None:
            images = self.model.project_images(images)  # for both
        trained = self.options.trained_candidates
        with torch.no_grad():
            taught = score(images, texts, pairs[:, :, trained:])
        return torch.cat([score(images, texts, pairs[:, :, :trained]), taught], 2)

    def _candidates(self, similarity: Tensor, positives: Tensor, own: Tensor, groups: Tensor) -> Candidates:
        mined = self._mine(similarity.detach(), positives, groups)
        # A masked slot repeats the positive pair, which costs nothing: repeated pairs are scored once.
        negatives = torch.where(mined.valid, mined.indices, own[:, None])
        indices = torch.cat([own[:, None], negatives], 1)  # [B, 1 + K]
        valid = torch.cat([torch.ones_like(mined.valid[:, :1]), mined.valid], 1)  # [B, 1 + K]
        return Candidates(indices, valid, similarity.gather(1, indices))

    def _mine(self, similarity: Tensor, positives: Tensor, groups: Tensor) -> Mined:
        return MINING[self.options.mining](similarity, positives, groups, self.options)

    def _gather_states(self, images: ImageState, texts: TextState) -> tuple[ImageState, TextState]:
        if world_size() == 1:
            return images, texts
        tokens = all_gather_padded(texts.tokens, gradient=True)
        mask = all_gather_padded(texts.mask.long()).bool()
        # Keys and values are projected after the gather, of the images in this rank's pairs only.
        gathered = type(images)(embeds=all_gather(images.embeds), tokens=all_gather(images.tokens, gradient=True))
        return gathered, type(texts)(all_gather(texts.embeds), tokens, mask)

    # 7. MLM

    def _mlm(self, images: ImageState, masked: MaskedTexts) -> Tensor:
        pairs = torch.arange(len(masked.labels)).repeat(2, 1).T  # [B, 2] each caption with its own image
        fused = self.model.fused_tokens(images, masked.state, pairs)  # [tokens, D]
        labels = masked.labels[masked.state.mask]  # [tokens]
        chosen = labels != losses.IGNORE_INDEX
        head = self.model.mlm_head
        assert head is not None
        words = self.model.dual.text.model.get_input_embeddings().weight
        logits = head(fused[chosen], words)  # [chosen, V]
        # Ranks hold different numbers of masked tokens: weigh so that the average over ranks is the mean over tokens.
        count = chosen.sum()
        return losses.mlm_loss(logits, labels[chosen]) * count * world_size() / all_sum(count).clamp(min=1)


def _shown_together(queries: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """`[B, G]`: whether some row of `own`, `others [G]` holds query i (an id among `own`) with the candidate j's id."""
    ordered, order = others.sort()
    group = torch.empty_like(order)
    group[order] = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)  # [G] one number for each id, from 0
    same = (queries[:, None] == own).to(torch.float32)  # [B, G]
    groups = torch.zeros_like(same).index_add_(1, group, same) > 0  # [B, G] whether a row of query i is in the group
    return groups.index_select(1, group)


def _gather_queries(x: Tensor) -> Tensor:
    """`[2, B, ...]` -> `[2, R B, ...]`, with gradient."""
    return all_gather(x.transpose(0, 1), gradient=True).transpose(0, 1)
