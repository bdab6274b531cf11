"""torch.compile: whole graphs, and lengths that change without compiling again. The backend runs the graphs as traced,
so no compiler is needed."""

from __future__ import annotations

import pytest
import torch
from helpers.step_reference import EveryThirdWord, assert_same_gradients, gradients, step, step_batch
from helpers.support import BERT, CNN, VIT, images, ragged_texts, tiny_model
from torch._dynamo.utils import counters

from loopitr.objective.build import build_objective
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.options import ObjectiveOptions

pytestmark = pytest.mark.slow

# Tracing takes time by the layer, and layers of one kind are traced alike. Of the fusion layers the last differs.
SHALLOW = {**VIT, "kwargs": {**VIT["kwargs"], "depth": 1}}
ONE_LAYER = {**BERT, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(*arguments, **options):
    model = tiny_model(*arguments, **options)
    model.compile_parts(backend="eager", fullgraph=True)  # This raises at a graph break.
    return model


@pytest.mark.parametrize(
    ("vision", "style", "text", "precision"),
    [
        pytest.param(SHALLOW, "late", ONE_LAYER, torch.float32, id="vit"),
        pytest.param(CNN, "late", ONE_LAYER, torch.float32, id="cnn"),
        pytest.param(VIT, "shared", BERT, torch.float32, id="shared"),
        pytest.param(SHALLOW, "late", ONE_LAYER, torch.bfloat16, id="bf16"),
        pytest.param(CNN, "shared", BERT, torch.bfloat16, id="cnn-shared-bf16"),
    ],
)
def test_whole_graphs_with_the_same_result(vision, style, text, precision):
    plain, whole = tiny_model(vision, style, text=text).train(), compiled(vision, style, text=text).train()
    batch = step_batch(size=vision["image_size"])
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        expected, actual = step(plain, batch), step(whole, batch)
    if precision == torch.float32:
        torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-4)
        assert_same_gradients(gradients(whole, actual.loss), gradients(plain, expected.loss))
    else:
        for name in ("itc", "itm"):  # Distillation goes by the order of scores, which bf16 leaves almost tied.
            torch.testing.assert_close(actual.terms[name], expected.terms[name], atol=0.02, rtol=0.02)
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


@pytest.mark.parametrize("style", ["late", "shared"])
def test_other_lengths_are_not_compiled_again(style):
    model = compiled(SHALLOW, style, layers=1, text=ONE_LAYER).train()
    graphs = []
    for seed, longest in enumerate((9, 12, 7, 14, 10, 13)):
        texts = model.encode_texts(*ragged_texts(6, longest=longest, seed=seed))
        pairs = torch.randint(0, 6, (30, 2), generator=torch.Generator().manual_seed(seed))
        model.score_pairs(model.encode_images(images(6)), texts, pairs).score.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[0], graphs


def test_chunks_and_validation_need_a_graph_for_each_use_and_no_more():
    """Everything at once: chunks, blocks of any size, MLM, teachers without gradient, scoring with keys and values."""
    model = compiled(SHALLOW, layers=1, text=ONE_LAYER, mlm_head=True)
    options = ObjectiveOptions(num_negatives=4, itm_negatives=1, mlm=1.0)
    objective = build_objective(model, options, masking=EveryThirdWord(), pair_block=11)
    graphs = []
    for epoch in range(5):
        model.train()
        size = list(range(9 - epoch))
        cached_backward(objective, step_batch(size, size), chunk_size=3)
        model.eval()
        with torch.no_grad():
            texts = model.encode_texts(*ragged_texts(6 + epoch, longest=9 + epoch, seed=epoch))
            image_state = model.project_images(model.encode_images(images(5)))
            pairs = torch.randint(0, 5, (30, 2), generator=torch.Generator().manual_seed(epoch))
            model.score_pairs(image_state, texts, pairs, block_size=7)
            model.score_pairs(model.encode_images(images(5)), texts, pairs)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2], graphs


@pytest.mark.parametrize("projected", [False, True])
def test_token_agreement_goes_by_the_compiled_layout(projected):
    """Its buckets are padded with segments that occur twice, which must not count twice."""
    parts = {"vision": SHALLOW, "layers": 1, "text": ONE_LAYER, "fusion": {"agreement": 12}}
    plain, whole = tiny_model(**parts).train(), compiled(**parts).train()
    found = []
    for model in (plain, whole):
        model.agreement.score.weight.data.mul_(30)
        image_state, text_state = model.encode_images(images(4)), model.encode_texts(*ragged_texts(5))
        if projected:
            image_state = model.project_images(image_state)
        pairs = torch.tensor([[3, 4], [0, 0], [3, 1], [1, 2], [0, 4]])
        score = model.score_pairs(image_state, text_state, pairs).score
        found.append((score.detach(), gradients(model, score.square().sum())))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-4)
    assert_same_gradients(found[1][1], found[0][1])


def test_gradient_checkpointing_and_blocks_go_with_it():
    parts = {"vision": SHALLOW, "text": ONE_LAYER}
    plain, whole = tiny_model(**parts).train(), compiled(**parts).train()
    whole.fusion.gradient_checkpointing = True  # transformers warns in its own, which breaks the graph.
    actual = []
    for model, block in ((plain, None), (whole, 5)):
        image_state, text_state = model.encode_images(images(4)), model.encode_texts(*ragged_texts(5))
        pairs = torch.cartesian_prod(torch.arange(4), torch.arange(5))
        actual.append(gradients(model, model.score_pairs(image_state, text_state, pairs, block_size=block).score.sum()))
    assert_same_gradients(actual[1], actual[0])
