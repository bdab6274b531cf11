"""The structure terms are those written out in loops, and choose their candidates once."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.step_reference import embeds_of, gradients, step_batch
from helpers.support import tiny_model
from torch import Tensor

from loopitr import (
    Distillation,
    FrozenContrast,
    LoopObjective,
    PartialRanking,
    StructureTransfer,
)
from loopitr.objective import losses
from loopitr.objective.build import build_objective, build_terms
from loopitr.objective.options import ObjectiveOptions
from loopitr.objective.step import Step


def log_softmax_rows(rows: Tensor, columns: Tensor) -> list[list[float]]:
    """Of scalar products divided by 0.07, one after the other."""
    logits = [[float(torch.dot(a, b)) / 0.07 for b in columns] for a in rows]
    totals = [math.log(sum(math.exp(value) for value in row)) for row in logits]
    return [[value - total for value in row] for row, total in zip(logits, totals, strict=True)]


def structure_loop(source: Tensor, target: Tensor) -> float:
    source_logs, target_logs = log_softmax_rows(source, source), log_softmax_rows(target, target)
    size = len(source)
    divergences = [
        math.exp(source_logs[i][j]) * (source_logs[i][j] - target_logs[i][j]) for i in range(size) for j in range(size)
    ]
    return sum(divergences) / size


def contrast_loop(source: Tensor, target: Tensor, batch: dict[str, Tensor]) -> float:
    kept: list[int] = []
    images, captions = batch["identities"].tolist(), batch["caption_ids"].tolist()
    for row in range(len(images)):
        if images[row] not in images[:row] and captions[row] not in captions[:row]:
            kept.append(row)
    assert 1 < len(kept) < len(images)
    logs = log_softmax_rows(target[kept], source[kept])
    return -sum(logs[i][i] for i in range(len(kept))) / len(kept)


@pytest.mark.parametrize("source, target", [("image", "text"), ("text", "image")])
@pytest.mark.parametrize("name, made", [("cmd", StructureTransfer), ("cmc", FrozenContrast)])
def test_structure_terms_are_the_ones_written_out_in_loops(name, made, source, target):
    model, batch = tiny_model().train(), step_batch()
    out = LoopObjective(model, [made(source=source)])(**batch)
    embeds = {key: value.detach().double() for key, value in embeds_of(model, batch).items()}
    if name == "cmd":
        expected = structure_loop(embeds[source], embeds[target])
    else:
        expected = contrast_loop(embeds[source], embeds[target], batch)
    assert float(out.terms[name].detach()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    learned = {key for key, gradient in gradients(model, out.loss).items() if gradient.any()}
    towers = {"image": "dual.vision", "text": "dual.text."}
    assert any(key.startswith(towers[target]) for key in learned)
    assert not any(key.startswith(towers[source]) for key in learned)


def test_the_frozen_contrast_does_not_wait_for_a_gpu(gpu):
    model = tiny_model().train().cuda()
    objective = LoopObjective(model, [FrozenContrast()])
    batch = {name: value.cuda() for name, value in step_batch().items()}
    encoded = objective.encode(batch["input_ids"], batch["attention_mask"], pixel_values=batch["pixel_values"])
    step = Step(objective, encoded, batch["identities"], batch["caption_ids"])
    assert step.embeds.images.is_cuda and step.gathered.identities.is_cuda
    gpu.waits.clear()
    objective.terms[0](step).backward()
    assert gpu.waits == []


def test_the_hard_candidates_are_chosen_once_for_each_direction():
    calls = []

    def rule(teacher, valid):
        calls.append(len(teacher))
        return losses.hard_above_mean(teacher, valid)

    LoopObjective(tiny_model().train(), [Distillation(PartialRanking(rule))])(**step_batch())
    assert calls == [8, 8]


def test_weights_make_the_structure_terms():
    options = ObjectiveOptions(itc=0, itm=0, distillation=0, cmd=0.5, cmc=0.25, structure_source="text")
    assert build_terms(options) == [StructureTransfer(0.5, source="text"), FrozenContrast(0.25, source="text")]
    out = build_objective(tiny_model().train(), options)(**step_batch())
    torch.testing.assert_close(out.loss, 0.5 * out.terms["cmd"] + 0.25 * out.terms["cmc"])
