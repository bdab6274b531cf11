"""Which layers get LoRA adapters, and what cannot have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.support import CNN, VIT, images, tiny_config, tiny_model
from helpers.tiny_adapters import RANKS, adapted_model, shake, trained
from helpers.tiny_texts import TEXT, ended_texts

from loopitr import LoopITRConfig, LoopITRModel
from loopitr.models.lora import add_lora

pytest.importorskip("peft", reason="LoRA adapters are made by peft (extra `lora`)")

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}
SIGLIP = {"name": "vit_base_patch16_siglip_224", "image_size": 32, "kwargs": SMALL}
EVA = {"name": "eva02_tiny_patch14_224", "image_size": 28, "kwargs": SMALL}


def layers(model: LoopITRModel, part: str) -> set[str]:
    return {name.rpartition(".")[2] for name in model.config.lora[part]["modules"]}


@pytest.mark.parametrize(
    ("vision", "pooling", "expected"),
    [
        (VIT, "backbone", {"qkv", "proj", "fc1", "fc2"}),
        (SIGLIP, "backbone", {"qkv", "proj", "fc1", "fc2", "q", "kv"}),
        (SIGLIP, "mean", {"qkv", "proj", "fc1", "fc2"}),  # its pooling head is not used
        (EVA, "backbone", {"proj", "fc1", "fc2"}),  # it reads the weight of `qkv` itself
    ],
    ids=["vit", "siglip", "siglip without its head", "eva"],
)
def test_every_linear_layer_that_runs_and_all_adapters_learn(vision: dict[str, Any], pooling, expected, tmp_path):
    model = tiny_model(vision, vision_pooling=pooling)
    add_lora(model, vision_rank=2)
    assert layers(model, "vision") == expected and set(model.config.lora) == {"vision"}
    assert "patch_embed.proj" not in model.config.lora["vision"]["modules"]
    shake(model).get_image_features(images(2, vision["image_size"])).sum().backward()
    backbone = dict(model.dual.vision.named_parameters())
    assert all(p.grad is not None and p.grad.any() for p in backbone.values() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert trained(LoopITRModel.from_pretrained(tmp_path)) == trained(model)


@pytest.mark.parametrize("kind", ["distilbert", "modernbert", "clip", "siglip"])
def test_any_text_tower(kind):
    pooling = "backbone" if kind in ("clip", "siglip") else "mean"
    model = tiny_model(text=TEXT[kind], text_pooling=pooling).eval()
    texts = ended_texts(5, 9)
    expected = model.get_text_features(*texts)
    add_lora(model, text_rank=2)
    assert torch.equal(model.get_text_features(*texts), expected)
    actual = shake(model).get_text_features(*texts)
    assert not torch.equal(actual, expected)
    torch.testing.assert_close(model.merge_lora().get_text_features(*texts), actual, atol=1e-6, rtol=0)
    actual.sum().backward()
    backbone = dict(model.dual.text.named_parameters())
    assert all(p.grad is not None for p in backbone.values() if p.requires_grad)


def test_targets_are_names_or_what_they_end_in():
    modules = adapted_model(targets=["attn.proj", "blocks.1.mlp.fc1", "query"]).config.lora
    assert modules["vision"]["modules"] == ["blocks.0.attn.proj", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert modules["text"]["modules"] == [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]


@pytest.mark.parametrize(
    ("vision", "changes", "message"),
    [
        (VIT, {"targets": ["qkv", "qurey"]}, "no layer is called 'qurey'; layers end in dense, fc1, fc2, key, proj"),
        (VIT, {"targets": ["query"]}, r"model.lora.vision_rank: no layer there is called query"),
        (CNN, {}, "model.lora.vision_rank: no linear layer there; name convolutions"),
        ({"name": "tf_efficientnet_lite0", "image_size": 32, "kwargs": {}}, {"targets": ["conv_dw"], "text_rank": 0},
         "conv_dw cannot be adapted: a Conv2d of 32 groups"),
        ({"name": "tf_efficientnet_lite0", "image_size": 32, "kwargs": {}}, {"targets": ["conv_stem"], "text_rank": 0},
         "conv_stem cannot be adapted: a Conv2dSame"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_named_and_nothing_is_changed(vision, changes, message):
    model = tiny_model(vision)
    before = trained(model), model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{**RANKS, **changes})
    assert (trained(model), model.state_dict().keys()) == before and model.config.lora is None


def test_a_backbone_is_frozen_or_adapted():
    model = adapted_model(text_rank=0)
    with pytest.raises(ValueError, match="cannot freeze 'vision': its LoRA adapters train"):
        model.freeze(["vision"])
    model.freeze(["text"])
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(model, text_rank=2)
    frozen = tiny_model()
    frozen.freeze(["text"])
    with pytest.raises(ValueError, match="text is frozen, so it cannot learn adapters"):
        add_lora(frozen, **RANKS)


def test_the_config_is_checked():
    with pytest.raises(ValueError, match="lora must be one of vision, text, got 'fusion'"):
        tiny_config(lora={"fusion": {"rank": 2}})
    with pytest.raises(ValueError, match="unknown lora option 'r'"):
        LoopITRConfig(lora={"vision": {"r": 2}})
    assert tiny_config(lora={}).lora is None
