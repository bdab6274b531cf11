"""With the model on a GPU, pretended here: no operation mixes devices, and scoring does not wait for the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.step_reference import CASES, EveryThirdWord, model_of, step_batch
from helpers.support import images, ragged_texts, tiny_model
from helpers.tiny_gallery import evaluate, tiny_records

from loopitr.evaluation import retrieval
from loopitr.objective.build import build_objective
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.options import ObjectiveOptions


def test_pretending_finds_what_a_gpu_would_refuse(gpu):
    there = torch.ones(3, device="cuda")
    assert there.device.type == "cuda" and (there * 2).is_cuda and not there.cpu().is_cuda
    assert torch.ones(3).to("cuda").is_cuda and torch.ones(3).to(there).is_cuda
    assert gpu.waits == ["cpu"]
    for mixed in (lambda: there + torch.ones(3), lambda: torch.stack([there, torch.ones(3)])):
        with pytest.raises(RuntimeError, match="on cuda.* on cpu"):
            mixed()
    with pytest.raises(RuntimeError):
        torch.ones(3)[there.long()]
    assert (there[torch.tensor([0, 2])] + torch.tensor(1.0)).tolist() == [2, 2]
    assert gpu.waits == ["cpu", "tolist"]


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("style", ["late", "shared"])
def test_scoring_does_not_wait(gpu, style, projected):
    """Up to its end, given pairs and mask on the CPU; many texts, so that there are buckets."""
    model = tiny_model(style=style, fusion={"agreement": 12}).eval()
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(40)).flip(0)
    texts = ragged_texts(40)
    with torch.inference_mode():
        expected = model.score_pairs(model.encode_images(images(5)), model.encode_texts(*texts), pairs).logits
        model.cuda()
        image_state = model.encode_images(images(5).cuda())
        text_state = model.encode_texts(*(x.cuda() for x in texts))
        text_state = replace(text_state, mask=text_state.mask.cpu())
        if projected:
            image_state = model.project_images(image_state)
        gpu.waits.clear()
        scored = model.score_pairs(image_state, text_state, pairs, block_size=30)
    assert scored.logits.is_cuda and gpu.waits == []
    torch.testing.assert_close(scored.logits.cpu(), expected)


def test_recomputed_blocks_get_the_dropout_of_the_gpu(gpu, monkeypatch):
    """`checkpoint` restores the random state only of the devices of the tensors that it is given itself."""
    given = []
    monkeypatch.setattr(
        "loopitr.models.loop_model.checkpoint", lambda score, *args, **_: given.append(args) or score(*args)
    )
    model = tiny_model().train()
    model.cuda()
    image_state, text_state = (
        model.encode_images(images(5).cuda()),
        model.encode_texts(*(x.cuda() for x in ragged_texts())),
    )
    model.score_pairs(image_state, text_state, torch.cartesian_prod(torch.arange(5), torch.arange(5)), block_size=10)
    assert len(given) == 3
    assert all(any(isinstance(x, torch.Tensor) and x.is_cuda for x in args) for args in given)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_step(gpu, case, chunk_size, monkeypatch):
    options = ObjectiveOptions(**CASES[case])
    model = model_of(options)
    objective = build_objective(model, options, masking=EveryThirdWord())
    expected = objective(**step_batch())
    expected.loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    batch = {name: value.cuda() for name, value in step_batch().items()}
    if chunk_size is None:
        output = objective(**batch)
        output.loss.backward()
    else:
        objective.pair_block = 5
        output = cached_backward(objective, batch, chunk_size=chunk_size)
    assert output.loss.is_cuda and all(value.is_cuda for value in output.metrics.values())
    torch.testing.assert_close(output.loss.detach().cpu(), expected.loss.detach(), atol=1e-5, rtol=1e-5)
    actual = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(actual[name], wanted[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["memory", "disk", "recompute"])
def test_an_evaluation_waits_for_its_scores_once(gpu, monkeypatch, tmp_path, kind):
    waits = []
    score = retrieval.score_candidates

    def watched(*args, **kwargs):
        gpu.waits.clear()
        scores = score(*args, **kwargs)
        waits.extend(gpu.waits)
        return scores

    monkeypatch.setattr(retrieval, "score_candidates", watched)
    given = {"rerank": 4, "image_block": 4, "pair_block": 7}
    given |= {"token_storage": kind, "token_folder": tmp_path}
    records = tiny_records()
    expected = evaluate(tiny_model(), records, **given).rankings
    waits.clear()
    model = tiny_model()
    model.cuda()
    actual = evaluate(model, records, **given).rankings
    assert all(torch.equal(actual[head].t2i, expected[head].t2i) for head in ("dual", "match", "match_plus_similarity"))
    assert waits == ["cpu"] if kind != "recompute" else "cpu" in waits  # The backbones ask for lengths.
