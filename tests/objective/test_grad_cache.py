"""Batches in chunks: the plain step's gradients, with no more than a chunk in the backbones at a time."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from helpers.step_reference import CASES, EveryThirdWord, assert_same_gradients, gradients, model_of, step_batch
from helpers.support import BERT, CNN

from loopitr.objective import grad_cache
from loopitr.objective.build import build_objective
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.options import ObjectiveOptions


def objective_of(case="cprd", *, style="late", pair_block=None, **model):
    options = ObjectiveOptions(**CASES[case])
    return build_objective(
        model_of(options, style=style, **model), options, masking=EveryThirdWord(), pair_block=pair_block
    )


def chunked_gradients(objective, **arguments):
    objective.model.zero_grad()
    output = cached_backward(objective, step_batch(), **arguments)
    return output, {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


@functools.cache
def plain_step(case, style):
    """The output and the gradients of the whole batch at once, computed once for all sizes of chunks."""
    plain = objective_of(case, style=style)
    expected = plain(**step_batch())
    return expected, gradients(plain.model, expected.loss)


SLOW_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 20)]


@pytest.mark.parametrize("chunk_size", [3, *SLOW_SIZES])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("style", ["late", "shared"])
def test_gradients_are_the_plain_steps(style, case, chunk_size):
    expected, wanted = plain_step(case, style)
    output, actual = chunked_gradients(objective_of(case, style=style, pair_block=5), chunk_size=chunk_size)
    assert output.terms.keys() == expected.terms.keys() and output.metrics.keys() == expected.metrics.keys()
    for name, value in expected.terms.items():
        torch.testing.assert_close(output.terms[name], value, atol=1e-6, rtol=1e-5)
    assert actual.keys() == wanted.keys()
    assert_same_gradients(actual, wanted)


def test_without_pairs_and_with_a_scaled_distillation():
    for case, stage in (
        ("cprd", {"with_pairs": False}),
        ("cprd", {"distillation_scale": 0.25}),
        ("agreement", {"with_pairs": False}),
    ):
        objective = objective_of(case)
        wanted = gradients(objective.model, objective(**step_batch(), **stage).loss)
        _, actual = chunked_gradients(objective, chunk_size=3, **stage)
        assert_same_gradients(actual, wanted)


@pytest.mark.parametrize("frozen", [["vision"], ["text"], ["vision", "text"]])
def test_frozen_backbones_get_none(frozen):
    objective = objective_of()
    objective.model.freeze(frozen)
    wanted = gradients(objective.model, objective(**step_batch()).loss)
    _, actual = chunked_gradients(objective, chunk_size=3)
    assert actual.keys() == wanted.keys()
    assert_same_gradients(actual, wanted)


def test_image_tokens_of_a_cache():
    objective, batch = objective_of(), step_batch()
    objective.model.freeze(["vision"])
    wanted = gradients(objective.model, objective(**batch).loss)
    batch["image_tokens"] = objective.model.dual.vision(batch.pop("pixel_values")).detach()
    objective.model.zero_grad()
    cached_backward(objective, batch, chunk_size=3)
    actual = {name: p.grad for name, p in objective.model.named_parameters() if p.grad is not None}
    assert_same_gradients(actual, wanted)


def test_dropout_is_the_same_in_both_passes():
    """With one chunk the plain step draws the same numbers; with several, a wrong replay would show in the text."""
    text = {**BERT, "hidden_dropout_prob": 0.3}
    objective = objective_of(text=text, fusion={"dropout": 0.2})
    torch.manual_seed(1)
    wanted = gradients(objective.model, objective(**step_batch()).loss)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    _, actual = chunked_gradients(objective, chunk_size=8)
    assert_same_gradients(actual, wanted)
    assert torch.equal(torch.get_rng_state(), after)  # The second passes do not move the generator.

    drawn: dict[int, list[torch.Tensor]] = {}
    dropout = objective.model.dual.text.model.embeddings.dropout
    dropout.register_forward_hook(lambda module, args, output: drawn.setdefault(len(drawn), []).append(output == 0))
    chunked_gradients(objective, chunk_size=3)
    masks = [drawn[index][0] for index in range(6)]
    for first, second in zip(masks[:3], masks[3:]):
        assert torch.equal(first, second)
    assert not torch.equal(masks[0], masks[1])


def test_a_chunk_at_a_time_and_no_token_that_is_not_needed(monkeypatch):
    rows = []
    for case, needed in (("itc", False), ("cprd", True)):
        objective = objective_of(case)
        objective.model.dual.vision.register_forward_hook(lambda module, args, output: rows.append(len(output)))
        compare, seen = objective.compare, []
        monkeypatch.setattr(objective, "compare", lambda e, *a, **k: seen.append(e) or compare(e, *a, **k))
        chunked_gradients(objective, chunk_size=3)
        assert rows == [3, 3, 2, 3, 3, 2]
        rows.clear()
        assert all(bool(state.tokens.numel()) == needed for state in (seen[0].images, seen[0].texts))


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def test_only_what_is_differentiated_has_a_graph_and_every_pass_is_under_autocast(monkeypatch):
    objective, graphs, casts = objective_of(), [], []
    encode, compare = objective.encode, objective.compare

    def noting(part):
        graphs.append(torch.is_grad_enabled())
        casts.append(torch.is_autocast_enabled("cpu"))
        return part

    monkeypatch.setattr(objective, "encode", lambda **chunk: noting(encode)(**chunk))
    monkeypatch.setattr(objective, "compare", lambda *a, **k: noting(compare)(*a, **k))
    chunked_gradients(objective, chunk_size=3, autocast=bfloat16)
    # In the first pass only the first chunk has gradient.
    assert graphs == [True, False, False, True, True, True, True]
    assert casts == [True] * 7


def test_a_chunk_is_gone_before_what_comes_next(monkeypatch):
    objective, made, alive, trimmed = objective_of(), [], [], []
    encode, compare = objective.encode, objective.compare

    def left():
        return sum(encoded() is not None for encoded in made)

    def noting(**chunk):
        alive.append(left())
        encoded = encode(**chunk)
        made.append(weakref.ref(encoded))
        return encoded

    monkeypatch.setattr(objective, "encode", noting)
    monkeypatch.setattr(objective, "compare", lambda *a, **k: alive.append(left()) or compare(*a, **k))
    monkeypatch.setattr(grad_cache, "trim_memory", lambda: trimmed.append(left()))
    chunked_gradients(objective, chunk_size=3)
    assert alive == [0] * 7 and trimmed == [0] * 3  # It happens after each chunk of the second pass.


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_of_nothing_is_refused(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        cached_backward(objective_of(), step_batch(), chunk_size=chunk_size)


def test_pairs_are_scored_in_blocks(monkeypatch):
    objective = objective_of(pair_block=5)
    score, sizes = objective.model._score_block, []
    monkeypatch.setattr(objective.model, "_score_block", lambda *a: sizes.append(len(a[-1])) or score(*a))
    chunked_gradients(objective, chunk_size=3)
    forward = sizes[: len(sizes) // 2]
    assert max(sizes) <= 5 and len(forward) > 1
    assert sorted(sizes) == sorted(2 * forward)  # Each runs once more in the backward pass.


def test_bfloat16_gradients():
    objective = objective_of()
    with bfloat16():
        expected = objective(**step_batch())
    wanted = gradients(objective.model, expected.loss)
    output, actual = chunked_gradients(objective, chunk_size=3, autocast=bfloat16)
    torch.testing.assert_close(output.loss, expected.loss, atol=0.03, rtol=0.03)
    flat = [torch.cat([grads[name].flatten().float() for name in wanted]) for grads in (actual, wanted)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_batch_statistics_of_a_chunk_are_refused():
    objective = objective_of(vision=CNN)
    with pytest.raises(ValueError, match=r"dual.vision.model.conv1.1 takes those of the batch.*hold_batch_statistics"):
        cached_backward(objective, step_batch(size=64), chunk_size=3)
    objective.model.dual.vision.hold_statistics = True
    objective.model.train()
    wanted = gradients(objective.model, objective(**step_batch(size=64)).loss)
    objective.model.zero_grad()
    cached_backward(objective, step_batch(size=64), chunk_size=3)
    actual = {name: p.grad for name, p in objective.model.named_parameters() if p.grad is not None}
    assert_same_gradients(actual, wanted)
