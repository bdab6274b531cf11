"""Attention is torch's scaled_dot_product_attention, in the text backbone and in the fusion head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.support import images, ragged_texts, tiny_model

from loopitr import LoopITRModel


@pytest.fixture
def keys_seen(monkeypatch):
    """How many keys there were, call by call."""
    seen = []
    attention = F.scaled_dot_product_attention

    def noting(query, key, *args, **kwargs):
        seen.append(key.shape[-2])
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    return seen


def test_a_bert_reports_and_uses_it(tmp_path, keys_seen):
    tiny_model().save_pretrained(tmp_path)
    for model in (tiny_model(), LoopITRModel.from_pretrained(tmp_path)):
        assert model.dual.text.model.config._attn_implementation == "sdpa"
        keys_seen.clear()
        model.encode_texts(*ragged_texts())
        assert len(keys_seen) >= 2  # layers


@pytest.mark.parametrize("style", ["late", "shared"])
def test_fusion_uses_it_for_both_attentions(style, keys_seen):
    model = tiny_model(style=style)
    state, texts = model.project_images(model.encode_images(images(4))), model.encode_texts(*ragged_texts(5))
    tokens, longest = state.tokens.shape[1], texts.tokens.shape[1]
    assert tokens > longest
    keys_seen.clear()
    model.score_pairs(state, texts, torch.cartesian_prod(torch.arange(4), torch.arange(5)))
    assert keys_seen.count(tokens) >= 2 and sum(count <= longest for count in keys_seen) >= 2  # layers
