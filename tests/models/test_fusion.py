"""The fusion encoder against a plain per-pair forward, values and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.support import CNN, VIT, images, plain_score, ragged_texts, tiny_model

from loopitr.models.cross_attention import CrossAttention
from loopitr.models.layout import pick_rows
from loopitr.models.packing import lay_out


def _states(model, count_images, count_texts):
    size = model.dual.vision.image_size
    image_state = model.encode_images(images(count_images, size))
    return image_state, model.encode_texts(*ragged_texts(count_texts))


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("vision", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("layers", [1, 2])
def test_score_pairs_is_the_plain_forward(style, vision, layers):
    model = tiny_model(vision, style, layers).double().eval()
    torch.set_default_dtype(torch.float64)
    try:
        image_state, text_state = _states(model, 4, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    # Shuffled, with repeats; image 2 and text 1 in no pair.
    pairs = torch.tensor([[3, 4], [0, 0], [3, 0], [1, 2], [0, 0], [3, 3], [0, 4], [3, 4]])
    expected = plain_score(model, image_state.tokens, text_state, pairs)
    got = model.score_pairs(image_state, text_state, pairs)
    torch.testing.assert_close(got.logits.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.score, got.logits[:, 1] - got.logits[:, 0])


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("count", [8, 64])  # 64: several length buckets
def test_gradients_are_the_plain_ones(style, count):
    model = tiny_model(VIT, style).train()
    pairs = torch.randint(0, 6, (count, 2), generator=torch.Generator().manual_seed(3))
    weights = torch.randn(count, 2, generator=torch.Generator().manual_seed(4))
    gradients = []
    for fast in (True, False):
        model.zero_grad()
        image_state, text_state = _states(model, 6, 6)
        if fast:
            logits = model.score_pairs(image_state, text_state, pairs).logits
        else:
            logits = plain_score(model, image_state.tokens, text_state, pairs)
        (logits * weights).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, atol=2e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("style", ["late", "shared"])
def test_many_pairs_of_uneven_sizes(style):
    """Enough pairs for several buckets by text and by image, in blocks and at once."""
    model = tiny_model(VIT, style).eval()
    image_state = model.encode_images(images(24))
    text_state = model.encode_texts(*ragged_texts(40, longest=20))
    generator = torch.Generator().manual_seed(5)
    hub = torch.stack([torch.zeros(30, dtype=torch.int64), torch.arange(30)], 1)  # One image has most of the pairs.
    columns = [torch.randint(low, high, (60,), generator=generator) for low, high in ((1, 24), (0, 40))]
    rest = torch.stack(columns, 1)
    pairs = torch.cat([hub, rest])[torch.randperm(90, generator=generator)]
    expected = plain_score(model, image_state.tokens, text_state, pairs)
    for block_size in (None, 7, 1):
        got = model.score_pairs(image_state, text_state, pairs, block_size=block_size).logits
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    projected = model.project_images(image_state)
    torch.testing.assert_close(model.score_pairs(projected, text_state, pairs).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("vision", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("absorb", [True, False])
def test_weights_taken_to_the_captions_side_change_nothing(style, vision, absorb, monkeypatch):
    """Key and value weights on the query's side, or images projected: one result, values and gradients."""
    monkeypatch.setattr(CrossAttention, "absorbs", lambda *arguments: absorb)
    model = tiny_model(vision, style).train()
    pairs = torch.randint(0, 6, (40, 2), generator=torch.Generator().manual_seed(3))
    weights = torch.randn(40, 2, generator=torch.Generator().manual_seed(4))
    actual = []
    for score in (model.score_pairs, None):
        model.zero_grad()
        image_state, text_state = _states(model, 6, 6)
        calls: list[int] = []
        hook = model.fusion.cross[1].key.register_forward_hook(lambda *_: calls.append(1))
        if score is None:
            logits = plain_score(model, image_state.tokens, text_state, pairs)
        else:
            logits = score(image_state, text_state, pairs).logits
            assert len(calls) == (0 if absorb else 1)
        hook.remove()
        (logits * weights).sum().backward()
        actual.append((logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(actual[0][0], actual[1][0], atol=2e-5, rtol=1e-4)
    assert actual[0][1].keys() == actual[1][1].keys()
    for name, expected in actual[1][1].items():
        torch.testing.assert_close(actual[0][1][name], expected, atol=5e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("chosen", [[0, 1, 2], [3, 4], [0, 2, 4]], ids=["first", "last", "apart"])
def test_some_images_of_many_with_keys_and_values(chosen):
    """Whether the images in the pairs follow each other, which needs no copy, or not."""
    model = tiny_model(VIT).eval()
    image_state, text_state = _states(model, 5, 40)
    pairs = torch.cartesian_prod(torch.tensor(chosen), torch.arange(40))
    expected = model.score_pairs(image_state, text_state, pairs).logits
    actual = model.score_pairs(model.project_images(image_state), text_state, pairs).logits
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    few = pairs[:3]  # There is one bucket.
    torch.testing.assert_close(
        model.score_pairs(model.project_images(image_state), text_state, few).logits, expected[:3], atol=1e-6, rtol=1e-5
    )


def test_images_in_a_row_are_not_copied():
    table = torch.randn(6, 2)
    for rows, first in (([0, 1, 2, 3, 4, 5], 0), ([2, 3], 2)):
        picked = pick_rows(table, torch.tensor(rows))
        assert picked.data_ptr() == table[first:].data_ptr() and torch.equal(picked, table[rows])
    assert torch.equal(pick_rows(table, torch.tensor([1, 4])), table[[1, 4]])


def test_each_layer_projects_or_absorbs_by_its_own_rows(monkeypatch):
    """The last layer's queries are the pairs' first tokens alone: 30 a pair elsewhere are too many without keys."""
    model = tiny_model(VIT, layers=3).eval()
    pairs, mask = torch.tensor([[0, 0], [1, 0]]), torch.ones(1, 30, dtype=torch.bool)
    packed = torch.randn(30, model.dual.text.width)
    tokens = torch.randn(2, 17, model.dual.vision.width)
    absorbing: list[bool] = []
    forward = CrossAttention.forward

    def watched(self, hidden, query, image, images):
        absorbing.append(isinstance(image, torch.Tensor))
        return forward(self, hidden, query, image, images)

    monkeypatch.setattr(CrossAttention, "forward", watched)
    for fixed, first_only, expected in (
        (False, True, [False, False, True]),
        (False, False, [False] * 3),
        (True, True, [False] * 3),
    ):
        absorbing.clear()
        model.fusion(packed, tokens, lay_out(pairs, mask, fixed=fixed), first_only=first_only)
        assert absorbing == expected


def test_the_cheaper_way_is_taken():
    """Few rows per image: 12 heads over 197 tokens of width 768 pay up to 51 rows."""
    options = {"num_heads": 12, "attention_dropout": 0.0, "layer_norm_eps": 1e-12, "dropout": 0.0}
    cross = CrossAttention(768, 768, options)
    assert [cross.absorbs(32 * rows, 32, 197) for rows in (1, 51, 52, 500)] == [True, True, False, False]
    cross.attention_dropout = 0.1  # Dropout would drop parts of the value's bias.
    assert not cross.train().absorbs(32, 32, 197) and cross.eval().absorbs(32, 32, 197)


@pytest.mark.parametrize("style", ["late", "shared"])
def test_padding_changes_nothing(style):
    model = tiny_model(VIT, style).eval()
    ids, mask = ragged_texts(3)
    pad = torch.zeros(3, 6, dtype=torch.int64)
    image_state = model.encode_images(images(2))
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    short, long = model.encode_texts(ids, mask), model.encode_texts(torch.cat([ids, pad], 1), torch.cat([mask, pad], 1))
    torch.testing.assert_close(short.embeds, long.embeds, atol=1e-5, rtol=1e-4)
    a, b = (model.score_pairs(image_state, state, pairs).logits for state in (short, long))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_one_projection_per_image_and_one_score_per_pair():
    model = tiny_model().eval()
    image_state, text_state = _states(model, 4, 5)
    seen = []
    model.fusion.cross[0].key.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    rows = []
    model.itm_head.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    model.score_pairs(image_state, text_state, torch.tensor([[1, 0], [1, 1], [1, 0], [3, 1], [1, 2]]))
    assert seen == [2] and rows == [4]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_ties_no_scores(weights):
    """bfloat16 has 256 numbers from 1 to 2: rounded to it, most of these scores would be equal."""
    model = tiny_model().eval().to(weights)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(40))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        pictures, texts = model.encode_images(images(5).to(weights)), model.encode_texts(*ragged_texts(40))
        score = model.score_pairs(pictures, texts, pairs).score
    assert score.dtype == torch.float32 and len(score.unique()) > 0.9 * len(pairs)
    for embeds in (pictures.embeds, texts.embeds):
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(embeds)))


def test_gradient_checkpointing_gives_the_same_gradients():
    results = []
    for enable in (False, True):
        model = tiny_model(VIT, "late").train()
        if enable:
            model.gradient_checkpointing_enable()
            assert model.fusion.gradient_checkpointing and model.dual.vision.model.grad_checkpointing
        image_state, text_state = _states(model, 3, 3)
        pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        model.score_pairs(image_state, text_state, pairs).score.sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_bad_pairs_are_named():
    model = tiny_model().eval()
    image_state, text_state = _states(model, 2, 5)
    every = torch.cartesian_prod(torch.arange(2), torch.arange(5))
    for pair, said in (([0, 5], "text 5, but texts are 0 to 4"), ([-1, 0], "image -1, but images are 0 to 1")):
        with pytest.raises(ValueError, match=said):
            model.score_pairs(image_state, text_state, torch.tensor([pair]))
    for wrong in (torch.zeros(3), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="int64"):
            model.score_pairs(image_state, text_state, wrong)
    for size in (0, -5):
        with pytest.raises(ValueError, match=f"block_size must be at least 1, got {size}"):
            model.score_pairs(image_state, text_state, every, block_size=size)
    mask = text_state.mask.clone()
    mask[3] = False
    with pytest.raises(ValueError, match="text 3 has no token"):
        model.score_pairs(image_state, dataclasses.replace(text_state, mask=mask), every[every[:, 1] > 1])
    assert model.score_pairs(image_state, text_state, torch.zeros(0, 2, dtype=torch.int64)).score.shape == (0,)
