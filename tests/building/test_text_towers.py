"""CLIP's and SigLIP's text towers, which find their end in the ids, and what every text encoder has to hold."""

from __future__ import annotations

import pytest
import torch
from helpers.support import images, ragged_texts, tiny_model
from helpers.tiny_texts import TEXT, ended_texts, text_backbone

from loopitr import LoopITRModel


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
@torch.no_grad()
def test_the_towers_own_pooling_is_transformers(name):
    """With padding as far as the tower takes, as their processors pad; only CLIP's looks at the mask."""
    ids, mask = ended_texts(9, 11)
    backbone = text_backbone(TEXT[name], "backbone")
    for parameter in backbone.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter))
    output = backbone(ids, mask)
    expected = backbone.model(torch.nn.functional.pad(ids, (0, 24 - 11)))
    pooled = backbone.pool(output, mask)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-6, rtol=1e-5)
    assert pooled.shape == (9, backbone.pooled_width) and backbone.pooled_width == (40 if name == "siglip2" else 32)
    real = mask.bool()
    assert output.tokens.shape == (9, 11, 32)
    torch.testing.assert_close(output.tokens[real], expected.last_hidden_state[:, :11][real], atol=1e-6, rtol=1e-5)
    rubbish = ids.masked_fill(~real, 7)
    torch.testing.assert_close(backbone.pool(backbone(rubbish, mask), mask), pooled, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_clips_of_the_old_kind_pool_at_the_greatest_id():
    """OpenAI's configs say `eos_token_id: 2`, and their end of text is the last of the vocabulary."""
    backbone = text_backbone({**TEXT["clip"], "eos_token_id": 2}, "backbone")
    ids, mask = ragged_texts(9)
    ends = mask.sum(1) - 1
    ids = ids.clamp(max=58)
    ids[torch.arange(9), ends] = 59
    output = backbone(ids, mask)
    torch.testing.assert_close(backbone.pool(output, mask), output.tokens[torch.arange(9), ends])


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_nothing_is_trained_that_pooling_goes_past(name, pooling):
    """DDP wants a gradient of every trained parameter."""
    backbone = text_backbone(TEXT[name], pooling)
    ids, mask = ended_texts(3, 9)
    backbone.pool(backbone(ids, mask), mask).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["clip", "siglip", "xlm-roberta", "modernbert"])
@torch.no_grad()
def test_a_saved_model_comes_back_the_same(name, tmp_path):
    model = tiny_model(text=TEXT[name]).eval()
    model.save_pretrained(tmp_path)
    loaded = LoopITRModel.from_pretrained(tmp_path).eval()
    inputs = images(2), *ended_texts(9, 11)
    assert torch.equal(loaded(*inputs).logits_per_image, model(*inputs).logits_per_image)
