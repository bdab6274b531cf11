"""Text backbones: poolings, limits, layers, and captions encoded in buckets of like length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.support import BERT, images, plain_score, ragged_texts, tiny_model
from helpers.tiny_texts import BERT_LAYERS, TEXT, text_backbone

from loopitr.models.text_backbone import TextBackbone, TextOutput

OTHER_LAYERS: dict[str, dict[str, Any]] = {  # These encoders have an `intermediate`, but compute something else.
    "mpnet": {**BERT, "model_type": "mpnet", "pad_token_id": 0},
    "deberta-v2": {**BERT, "model_type": "deberta-v2"},
    "roformer": {**BERT, "model_type": "roformer"},
    "xmod": {**BERT, "model_type": "xmod", "default_language": "en_XX"},
    "mra": {**BERT, "model_type": "mra"},
    "yoso": {**BERT, "model_type": "yoso"},
}


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_text_poolings_ignore_the_padding(name):
    ids, mask = ragged_texts(3)
    longer = [torch.nn.functional.pad(x, (0, 5)) for x in (ids, mask)]
    for pooling in ("first", "mean"):
        backbone = text_backbone(TEXT[name], pooling)
        output = backbone(ids, mask)
        for row in range(3):
            real = output.tokens[row, : mask[row].sum()]
            expected = real[0] if pooling == "first" else real.mean(0)
            torch.testing.assert_close(backbone.pool(output, mask)[row], expected, atol=1e-5, rtol=1e-4)
        padded = backbone.pool(backbone(*longer), longer[1])
        torch.testing.assert_close(padded, backbone.pool(output, mask), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_backbones_own_pooling():
    ids, mask = ragged_texts(3)
    backbone = text_backbone(BERT, "backbone")
    output = backbone(ids, mask)
    expected = torch.tanh(backbone.model.pooler.dense(output.tokens[:, 0]))
    torch.testing.assert_close(backbone.pool(output, mask), expected)
    assert text_backbone(BERT, "mean").model.pooler is None  # Nothing would train it.
    without = text_backbone(TEXT["distilbert"], "backbone")
    with pytest.raises(ValueError, match="DistilBertModel has no pooling of its own; use 'first' or 'mean'"):
        without.pool(without(ids, mask), mask)


@pytest.mark.parametrize("name, longest", [("bert", 24), ("roberta", 23), ("distilbert", 24)])
def test_a_caption_longer_than_the_backbone_takes(name, longest):
    """RoBERTa's positions start after its padding index, here 0."""
    backbone = text_backbone(TEXT[name])
    ids = torch.full((1, longest + 1), 7)
    backbone(ids[:, :-1], torch.ones(1, longest, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"captions of {longest + 1} tokens are longer than .* takes .{longest}."):
        backbone(ids, torch.ones_like(ids))


@torch.no_grad()
def test_inner_tokens_are_the_input_of_that_layer():
    ids, mask = ragged_texts(3)
    for name in ("bert", "roberta"):
        backbone = text_backbone(TEXT[name])
        seen: list[torch.Tensor] = []
        for layer in backbone.layers:
            layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        for index in (0, 1):
            seen.clear()
            inner = backbone(ids, mask, inner_layer=index).inner
            assert inner is not None and torch.equal(inner, seen[index])


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_pairs_score_on_every_text_backbone(name, style):
    if style == "shared" and name not in BERT_LAYERS:
        with pytest.raises(ValueError, match="'shared' needs BERT-type layers; .*(Bert|Text)Model has none"):
            tiny_model(style=style, text=TEXT[name])
        return
    model = tiny_model(style=style, layers=1, text=TEXT[name]).eval()
    image_state, text_state = model.encode_images(images(2)), model.encode_texts(*ragged_texts(3))
    pairs = torch.tensor([[0, 1], [1, 2], [1, 0]])
    expected = plain_score(model, image_state.tokens, text_state, pairs)
    torch.testing.assert_close(model.score_pairs(image_state, text_state, pairs).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_shared_fusion_refuses_layers_that_are_not_berts(name):
    with pytest.raises(ValueError, match="fusion.style 'shared' needs BERT-type layers"):
        tiny_model(style="shared", text=OTHER_LAYERS[name])


def test_more_shared_layers_than_the_backbone_has():
    with pytest.raises(ValueError, match="fusion.num_layers 3 is more than the text backbone's 2"):
        tiny_model(style="shared", layers=3)


def test_unknown_text_model_is_named():
    with pytest.raises(ValueError, match="barth"):
        text_backbone({"model_type": "barth"})


# Buckets


def row_by_row(backbone: TextBackbone, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> list[TextOutput]:
    """Each caption alone, without its padding on the right: too few rows for buckets."""
    ends = [int(row.nonzero().max()) + 1 for row in mask]
    return [backbone(ids[[i], :end], mask[[i], :end], **options) for i, end in enumerate(ends)]


def sizes_run(backbone: TextBackbone) -> list[tuple[int, ...]]:
    """Fills with the shape of every run of the backbone."""
    shapes: list[tuple[int, ...]] = []
    backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("count", [1, 8, 40, 130])
@torch.no_grad()
def test_buckets_encode_like_row_by_row(name, count):
    backbone = text_backbone(TEXT[name])
    ids, mask = ragged_texts(count, longest=17)
    output = backbone(ids, mask)
    assert output.tokens.shape[:2] == (count, 17) and output.inner is None
    for row, alone in enumerate(row_by_row(backbone, ids, mask)):
        torch.testing.assert_close(output.tokens[row, : mask[row].sum()], alone.tokens[0], atol=1e-5, rtol=0)
        pooled = backbone.pool(output, mask)[row]
        torch.testing.assert_close(pooled, alone.tokens[0].mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([4] * 19 + [17] * 20 + [3], [(20, 4), (20, 17)]),
        ([16] * 20 + [17] * 20, [(40, 17)]),  # The lengths are too near each other.
        ([9] * 40, [(40, 9)]),
        ([4] * 15 + [17] * 16, [(31, 17)]),  # The captions are too few for two calls.
        ([2] * 33 + [5] * 32 + [9] * 32 + [17] * 31, [(32, 2), (32, 5), (32, 9), (32, 17)]),
        ([8] * 96 + [17] * 32, [(96, 8), (32, 17)]),
    ],
)
@torch.no_grad()
def test_short_captions_are_not_padded_to_the_longest_of_the_batch(lengths, runs):
    backbone = text_backbone(BERT)
    shapes = sizes_run(backbone)
    mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).long()
    output = backbone(7 * mask, mask)
    assert shapes == runs and output.tokens.shape[:2] == mask.shape


@pytest.mark.parametrize("pooling", ["mean", "first", "backbone"])
@pytest.mark.parametrize("count", [9, 40])
def test_the_gradients_of_buckets_are_those_of_row_by_row(pooling, count):
    backbone = text_backbone(BERT, pooling)
    ids, mask = ragged_texts(count, longest=17)
    weights = torch.randn(count, backbone.width)
    alone = [backbone.pool(one, torch.ones(one.tokens.shape[:2])) for one in row_by_row(backbone, ids, mask)]
    actual = []
    for pooled in (backbone.pool(backbone(ids, mask), mask), torch.cat(alone)):
        backbone.zero_grad()
        (pooled * weights).sum().backward()
        actual.append({name: p.grad.clone() for name, p in backbone.named_parameters()})
    words = "model.embeddings.word_embeddings.weight"
    assert actual[0][words].any()
    for name, expected in actual[1].items():
        torch.testing.assert_close(
            actual[0][name], expected, atol=1e-5 * max(1, float(expected.abs().max())), rtol=1e-4
        )


@pytest.mark.parametrize("name", ["bert", "roberta"])
@torch.no_grad()
def test_buckets_keep_the_inner_layer_and_the_backbones_own_pooling(name):
    backbone = text_backbone(TEXT[name], "backbone")
    ids, mask = ragged_texts(13, longest=17)
    for layer in (0, 1, 2):
        output = backbone(ids, mask, inner_layer=layer)
        for row, alone in enumerate(row_by_row(backbone, ids, mask, inner_layer=layer)):
            assert output.inner is not None and alone.inner is not None
            real = int(mask[row].sum())
            torch.testing.assert_close(output.inner[row, :real], alone.inner[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(output.pooler_output[row], alone.pooler_output[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "clip", "siglip"])
@torch.no_grad()
def test_a_caption_without_a_token_leaves_the_others_alone(name):
    backbone = text_backbone(TEXT[name])
    ids, mask = ragged_texts(12, longest=17)
    mask[5] = 0
    output = backbone(ids, mask)
    others = [row for row in range(12) if row != 5]
    for row, alone in zip(others, row_by_row(backbone, ids[others], mask[others]), strict=True):
        torch.testing.assert_close(output.tokens[row, : mask[row].sum()], alone.tokens[0], atol=1e-5, rtol=0)
    pooled = backbone.pool(output, mask)
    assert torch.equal(pooled[5], torch.zeros(backbone.width)) and pooled.isfinite().all()
    mask[:] = 0
    assert backbone(ids, mask).tokens.isfinite().all()


@torch.no_grad()
def test_captions_padded_on_the_left_keep_their_positions():
    backbone = text_backbone(BERT)
    ids, mask = (x.flip(1) for x in ragged_texts(12, longest=17))
    output = backbone(ids, mask)
    for row, alone in enumerate(row_by_row(backbone, ids, mask)):
        real = mask[row].bool()
        torch.testing.assert_close(output.tokens[row, real], alone.tokens[0, real], atol=1e-5, rtol=0)
