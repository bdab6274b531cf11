"""torch.compile: whole graphs, and lengths that change without compiling again. The backend runs the graphs as traced,
so no compiler is needed."""

from __future__ import annotations

import pytest
import torch
from step_reference import assert_same_gradients, gradients, step, step_batch
from support import CNN, VIT, images, ragged_texts, tiny_model
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(*arguments, **options):
    model = tiny_model(*arguments, **options)
    model.compile_parts(backend="eager", fullgraph=True)  # raises at a graph break
    return model


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("vision", [VIT, CNN], ids=["vit", "cnn"])
def test_whole_graphs_with_the_same_result(style, vision, precision):
    plain, whole = tiny_model(vision, style).train(), compiled(vision, style).train()
    batch = step_batch(size=vision["image_size"])
    close = {"atol": 1e-5, "rtol": 1e-4} if precision == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        expected, found = step(plain, batch), step(whole, batch)
    torch.testing.assert_close(found.loss, expected.loss, **close)
    if precision == torch.float32:
        assert_same_gradients(gradients(whole, found.loss), gradients(plain, expected.loss))
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


@pytest.mark.parametrize("style", ["late", "shared"])
def test_other_lengths_are_not_compiled_again(style):
    model = compiled(VIT, style).train()
    graphs = []
    for seed, longest in enumerate((9, 12, 7, 14, 10, 13)):
        texts = model.encode_texts(*ragged_texts(6, longest=longest, seed=seed))
        pairs = torch.randint(0, 6, (30, 2), generator=torch.Generator().manual_seed(seed))
        model.score_pairs(model.encode_images(images(6)), texts, pairs).score.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1], graphs  # two sizes that are equal by chance may cost one more graph


def test_gradient_checkpointing_and_blocks_go_with_it():
    plain, whole = tiny_model().train(), compiled().train()
    whole.fusion.gradient_checkpointing = True  # transformers warns in its own, which breaks the graph
    found = []
    for model, block in ((plain, None), (whole, 5)):
        image_state, text_state = model.encode_images(images(4)), model.encode_texts(*ragged_texts(5))
        pairs = torch.cartesian_prod(torch.arange(4), torch.arange(5))
        found.append(gradients(model, model.score_pairs(image_state, text_state, pairs, block_size=block).score.sum()))
    assert_same_gradients(found[1], found[0])
