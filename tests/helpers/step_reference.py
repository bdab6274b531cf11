"""A batch with every kind of twin, and the training step written out in loops over queries and candidates."""

from __future__ import annotations

import math
from typing import Any

import torch
from helpers.support import images, plain_score, ragged_texts, tiny_model
from torch import Tensor, nn

from loopitr import LoopITRModel, TextState
from loopitr.objective.build import build_objective
from loopitr.objective.options import ObjectiveOptions
from loopitr.objective.parts import StepOutput
from loopitr.objective.word_masking import TokenMasking

# Image 0 is in three rows and caption 2 in two; caption 2 describes image 0 and image 2, caption 1 image 1 and image 4.
IDENTITIES = [0, 1, 2, 0, 3, 4, 5, 0]
CAPTIONS = [0, 1, 2, 3, 4, 1, 5, 2]

CASES: dict[str, dict[str, Any]] = {
    "itc": {"itm": 0.0, "distillation": 0.0},
    "cprd": {"num_negatives": 3, "lce": 0.5},
    "kl_and_mlm": {"num_negatives": 3, "distillation_loss": "kl", "mlm": 1.0},
    "one_negative": {"num_negatives": 4, "itm_negatives": 1},
    "teacher_only": {"itm": 0.0, "distillation_loss": "kl"},
    "sigmoid": {"itc_loss": "sigmoid", "distillation": 0.0},
    "agreement": {"num_negatives": 3, "distillation_loss": "kl", "agreement": 0.5},
    "projections_and_mlm": {"num_negatives": 3, "mlm": 1.0, "distillation_trains": "projections"},
}


def model_of(options: ObjectiveOptions, **changes: Any) -> LoopITRModel:
    """A tiny model in training mode with the heads that the options ask for."""
    fusion = {"agreement": 12 if options.agreement else None, **changes.pop("fusion", {})}
    bias = -1.0 if options.itc_loss == "sigmoid" else None
    return tiny_model(mlm_head=bool(options.mlm), initial_logit_bias=bias, fusion=fusion, **changes).train()


def step_batch(
    identities: list[int] = IDENTITIES, captions: list[int] = CAPTIONS, *, size: int = 32, longest: int = 9
) -> dict[str, Tensor]:
    """What `LoopObjective.forward` takes; rows of one identity have the same pixels, of one caption the same words."""
    pixels, (ids, mask) = images(max(identities) + 1, size), ragged_texts(max(captions) + 1, longest)
    return {
        "pixel_values": pixels[identities],
        "input_ids": ids[captions],
        "attention_mask": mask[captions],
        "identities": torch.tensor(identities),
        "caption_ids": torch.tensor(captions),
    }


def step(
    model: LoopITRModel | None = None,
    batch: dict[str, Tensor] | None = None,
    *,
    masking: TokenMasking | None = None,
    scale: float = 1.0,
    **options: Any,
) -> StepOutput:
    objective = build_objective(model or tiny_model().train(), ObjectiveOptions(**options), masking=masking)
    return objective(**(batch or step_batch()), distillation_scale=scale)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-3) -> None:
    largest = max(float(g.abs().max()) for g in expected.values())
    for name in expected.keys() | got.keys():
        a, b = (grads.get(name, torch.zeros(())) for grads in (got, expected))
        atol = rtol * 1e-2 * largest
        torch.testing.assert_close(a, b.expand_as(a), atol=atol, rtol=rtol, msg=lambda m: f"{name}: {m}")


def is_positive(batch: dict[str, Tensor], image: int, text: int) -> bool:
    rows = zip(batch["identities"].tolist(), batch["caption_ids"].tolist(), strict=True)
    wanted = int(batch["identities"][image]), int(batch["caption_ids"][text])
    return wanted in list(rows)


def reference_step(model: LoopITRModel, batch: dict[str, Tensor], options: ObjectiveOptions) -> dict[str, Tensor]:
    """The terms by name, and `valid_length`."""
    image_tokens = model.dual.vision(batch["pixel_values"])
    image_embeds = model.dual.embed_image_tokens(image_tokens)
    texts = model.encode_texts(batch["input_ids"], batch["attention_mask"])
    size = len(image_embeds)
    scale = torch.clamp(torch.exp(model.dual.logit_scale), max=100)
    similarity = [[scale * torch.dot(image_embeds[i], texts.embeds[j]) for j in range(size)] for i in range(size)]
    positive = [[is_positive(batch, i, j) for j in range(size)] for i in range(size)]
    every = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    itm_logits = plain_score(model, image_tokens, texts, every).unflatten(0, (size, size))  # [B images, B texts, 2]

    itc: list[Tensor] = []
    for query in range(size):
        for row, truth in (
            (similarity[query], positive[query]),
            ([similarity[i][query] for i in range(size)], [positive[i][query] for i in range(size)]),
        ):
            total = torch.logsumexp(torch.stack(row), 0)
            own = [total - score for score, is_own in zip(row, truth, strict=True) if is_own]
            itc.append(sum(own) / len(own))

    match: list[Tensor] = []  # These are cross entropies of the ITM head at positives.
    mismatch: list[Tensor] = []  # These are those at negatives.
    ranked: list[Tensor] = []  # These are cross entropies of the positive among a query's candidates.
    distilled: list[list[Tensor]] = [[], []]
    lengths: list[list[int]] = [[], []]
    for query in range(size):
        for side in (0, 1):  # Images ask for texts, then texts for images.
            pairs = [(query, j) if side == 0 else (j, query) for j in range(size)]
            groups = batch["caption_ids" if side == 0 else "identities"].tolist()
            scores = [similarity[i][j].item() for i, j in pairs]
            chosen: list[int] = []
            for j in sorted(range(size), key=lambda j: -scores[j]):
                if positive[pairs[j][0]][pairs[j][1]]:
                    continue
                if groups[j] not in [groups[c] for c in chosen] and len(chosen) < options.num_negatives:
                    chosen.append(j)
            candidates = [pairs[j] for j in [query, *chosen]]
            logits = torch.stack([itm_logits[i, j] for i, j in candidates])  # [1 + K, 2]
            labels = torch.tensor([1] + [0] * len(chosen))
            cross_entropies = torch.logsumexp(logits, 1) - logits[torch.arange(len(labels)), labels]
            match += list(cross_entropies[: 1 - side])  # The positive pair counts once.
            mismatch += list(cross_entropies[1:])
            scores_of = logits[:, 1] - logits[:, 0]
            if chosen:
                ranked.append(torch.logsumexp(scores_of, 0) - scores_of[0])
            student = [similarity[i][j] for i, j in candidates]
            teacher = scores_of.detach().tolist()
            loss, length = _distil(student, teacher, options)
            lengths[side].append(length)
            if loss is not None:
                distilled[side].append(loss)
    return {
        "itc": sum(itc) / len(itc),
        "itm": _mean(match, mismatch, balanced=options.balance_itm),
        "lce": sum(ranked) / len(ranked),
        "distillation": sum(sum(side) / len(side) for side in distilled if side) / 2,
        "valid_length": torch.tensor(sum(map(sum, lengths)) / (2 * size)),
    }


def _mean(match: list[Tensor], mismatch: list[Tensor], *, balanced: bool) -> Tensor:
    if balanced and match and mismatch:
        return (sum(match) / len(match) + sum(mismatch) / len(mismatch)) / 2
    return sum(match + mismatch) / len(match + mismatch)


def _distil(student: list[Tensor], teacher: list[float], options: ObjectiveOptions) -> tuple[Any, int]:
    """The loss of one query, None where it has nothing to teach, and how many candidates it ranked."""
    if options.distillation_loss == "kl":
        weights = [math.exp(t / options.teacher_temperature) for t in teacher]
        total = torch.logsumexp(torch.stack(student), 0)
        loss = 0
        for score, weight in zip(student, weights, strict=True):
            probability = weight / sum(weights)
            loss = loss + probability * (math.log(probability) - (score - total))
        return (loss if len(student) > 1 else None), len(student)
    assert options.distillation_loss == "cprd"
    order = sorted(range(1, len(teacher)), key=lambda j: -teacher[j])  # These are the negatives, the hardest first.
    if options.hard_rule == "mean":
        hard = sum(teacher[j] > sum(teacher[1:]) / len(order) for j in order)
    elif options.hard_rule == "threshold":
        hard = sum(1 / (1 + math.exp(-teacher[j])) > options.hard_threshold for j in order)
    else:
        hard = min(options.hard_top, len(order))
    terms = [torch.logsumexp(torch.stack([student[k] for k in order[j:]]), 0) - student[order[j]] for j in range(hard)]
    return (sum(terms) / hard if hard else None), hard


def reference_mlm(model: LoopITRModel, batch: dict[str, Tensor], changed: Tensor, labels: Tensor) -> Tensor:
    """Fused state of one masked token after the other: fusion has no positions, so a token put first is scored."""
    image_tokens = model.dual.vision(batch["pixel_values"])
    texts = model.encode_texts(changed, batch["attention_mask"])
    itm_head, model.itm_head = model.itm_head, nn.Identity()
    terms = []
    try:
        for row, column in (labels != -100).nonzero().tolist():
            order = [column, *(c for c in range(int(texts.mask[row].sum())) if c != column)]
            turned = TextState(texts.embeds[[row]], texts.tokens[[row]][:, order], texts.mask[[row]][:, order])
            fused = plain_score(model, image_tokens[[row]], turned, torch.tensor([[0, 0]]))
            words = model.dual.text.model.get_input_embeddings().weight
            logits = model.mlm_head(fused, words)  # [1, V]
            terms.append(nn.functional.cross_entropy(logits, labels[row, [column]]))
    finally:
        model.itm_head = itm_head
    return sum(terms) / len(terms)


class EveryThirdWord:
    """A `TokenMasking` without chance: it hides the words whose number is a multiple of 3, the first token never."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (input_ids % 3 == 0) & attention_mask.bool()
        chosen[:, 0] = False
        return torch.where(chosen, 4, input_ids), torch.where(chosen, input_ids, -100)


def embeds_of(model: LoopITRModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    texts = model.encode_texts(batch["input_ids"], batch["attention_mask"])
    return {"image": model.encode_images(batch["pixel_values"]).embeds, "text": texts.embeds}
