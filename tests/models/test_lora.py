"""LoRA adapters: what they change and what not, saved, merged, exported; which layers get them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers.step_reference import assert_same_gradients, gradients, step, step_batch
from helpers.support import images, ragged_texts, tiny_model
from helpers.tiny_adapters import PAIRS, RANKS, adapted_model, plain_model, trained
from helpers.tiny_gallery import tiny_processor
from helpers.tiny_outputs import assert_same_tensors, outputs
from safetensors.torch import load_file

from loopitr import DualEncoder, LoopITRModel
from loopitr.export.dual import export_dual
from loopitr.models.lora import add_lora, is_adapter

pytest.importorskip("peft", reason="LoRA adapters are made by peft (extra `lora`)")

BOTH = pytest.mark.parametrize(("vision", "style"), [("vit", "late"), ("vit", "shared"), ("cnn", "late")])


# What they do


@BOTH
def test_at_the_start_nothing_changes(vision, style):
    expected = outputs(plain_model(vision, style).eval())
    actual = outputs(adapted_model(vision, style, shaken=False).eval())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    fresh = LoopITRModel(adapted_model(vision, style).config)  # transformers' own initialisation ran over it.
    ups = [p for name, p in fresh.named_parameters() if ".lora_B." in name]
    assert ups and not any(p.any() for p in ups)
    assert all(p.std() > 0 for name, p in fresh.named_parameters() if ".lora_A." in name)


def test_an_adapter_adds_its_scaled_product():
    model = adapted_model(alpha=5.0)
    for layer, rank in (
        (model.dual.vision.model.blocks[1].mlp.fc1, RANKS["vision_rank"]),
        (model.dual.text.model.encoder.layer[0].attention.self.key, RANKS["text_rank"]),
    ):
        x = torch.randn(7, 32)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert down.shape == (rank, 32) and up.shape[1] == rank
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 5.0 / rank * (x @ down.T) @ up.T)
    query = adapted_model().dual.text.model.encoder.layer[0].attention.self.query
    assert query.scaling == {"default": 2.0}  # alpha is twice the rank.


@BOTH
def test_only_adapters_heads_and_fusion_learn(vision, style):
    model = adapted_model(vision, style).train()
    actual = gradients(model, step(model, step_batch(size=model.dual.vision.image_size)).loss)
    assert actual.keys() == trained(model)
    backbones = {name for name in actual if name.startswith(("dual.vision.", "dual.text."))}
    assert backbones == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert {name.split(".")[0] for name in actual.keys() - backbones} == {"dual", "fusion", "itm_head"}
    assert all(actual[name].any() for name in backbones)


def test_one_step_changes_the_outputs_and_no_weight_of_a_backbone():
    model = adapted_model(shaken=False).train()
    before, weights = outputs(model), {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model).loss.backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed <= trained(model)
    assert {name for name in trained(model) if ".lora_B." in name} <= changed


def test_in_shared_style_the_pairs_train_the_text_adapters_too():
    """By their own way: the tokens that fusion starts from are cut off."""
    model = adapted_model(style="shared").train()
    texts = model.encode_texts(*ragged_texts(5))
    texts = type(texts)(texts.embeds.detach(), texts.tokens.detach(), texts.mask)
    pictures = model.image_state(model.dual.vision(images(3)).detach())
    actual = gradients(model, model.score_pairs(pictures, texts, torch.tensor(PAIRS)).score.sum())
    names = {name for name, _ in model.dual.text.named_parameters(prefix="dual.text") if is_adapter(name)}
    assert names and all(actual[name].any() for name in names)


@BOTH
def test_gradient_checkpointing_gives_the_same_gradients(vision, style):
    """Nothing that enters the first block has a gradient."""
    batch = step_batch(size=64 if vision == "cnn" else 32)
    actual = []
    for checkpointing in (False, True):
        model = adapted_model(vision, style).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        actual.append(gradients(model, step(model, batch).loss))
    assert actual[0].keys() == actual[1].keys() == trained(model)
    assert_same_gradients(actual[1], actual[0])


def test_batch_statistics_stay():
    model = adapted_model("cnn")
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert [name for name in before if "running_mean" in name]
    model.encode_images(images(4, 64))
    model.train().dual_encoder().train().get_image_features(images(4, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    text_only = adapted_model("cnn", vision_rank=0, targets=None).train()
    text_only.encode_images(images(4, 64))
    buffers = dict(text_only.named_buffers())
    assert not all(torch.equal(value, before[name.replace(".base_layer", "")]) for name, value in buffers.items())


def test_a_resized_model_trains_no_more_than_before():
    model = adapted_model()
    before = trained(model)
    model.resize_images(64)  # Its positions are new parameters.
    assert trained(model) == before


# Saving, merging, exporting


@BOTH
def test_save_and_load_with_adapters_in_place(vision, style, tmp_path):
    model = adapted_model(vision, style, dropout=0.1).eval()
    model.save_pretrained(tmp_path)
    loaded = LoopITRModel.from_pretrained(tmp_path)
    assert_same_tensors(model, loaded)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(loaded), strict=True))
    assert trained(loaded) == trained(model)
    assert loaded.config.lora == loaded.dual.config.lora == model.config.lora
    assert loaded.config.lora["text"]["rank"] == 2 and loaded.config.lora["vision"]["alpha"] == 6.0
    layer = loaded.dual.text.model.encoder.layer[0].attention.self.query
    assert layer.lora_dropout["default"].p == 0.1
    half = LoopITRModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_dual_encoder_alone_may_keep_its_adapters(tmp_path):
    model = adapted_model().eval()
    model.dual_encoder().save_pretrained(tmp_path)
    loaded = DualEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_image_features(images()), model.get_image_features(images()))
    assert {f"dual.{name}" for name in trained(loaded)} == {name for name in trained(model) if name.startswith("dual.")}


@BOTH
def test_merged_is_a_plain_model_with_equal_outputs(vision, style, tmp_path, monkeypatch):
    model = adapted_model(vision, style).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    merged = model.merge_lora()
    assert torch.equal(torch.random.get_rng_state(), state)
    for ours, theirs in zip(outputs(merged), outputs(model), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    plain = plain_model(vision, style)
    assert merged.state_dict().keys() == plain.state_dict().keys() and trained(merged) == trained(plain)
    assert not merged.training and merged.config.lora is None and merged.dual.config.lora is None
    # The merged model is a copy.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = LoopITRModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(outputs(merged), outputs(loaded), strict=True))


def test_export_merges(tmp_path, monkeypatch):
    model = adapted_model().eval()
    model.save_pretrained(tmp_path / "run")
    tiny_processor().save_pretrained(tmp_path / "run")
    export_dual(tmp_path / "run", tmp_path / "dual")
    names = load_file(tmp_path / "dual" / "model.safetensors").keys()
    assert names == plain_model().dual.state_dict().keys() and not any("lora" in name for name in names)
    assert not json.loads((tmp_path / "dual" / "config.json").read_text()).get("lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    dual = DualEncoder.from_pretrained(tmp_path / "dual")
    texts = ragged_texts()
    torch.testing.assert_close(dual.get_image_features(images()), model.get_image_features(images()), atol=1e-6, rtol=0)
    torch.testing.assert_close(dual.get_text_features(*texts), model.get_text_features(*texts), atol=1e-6, rtol=0)


def test_without_peft_one_line_says_what_to_install(tmp_path, monkeypatch):
    adapted_model().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    for attempt in (lambda: add_lora(tiny_model(), text_rank=2), lambda: LoopITRModel.from_pretrained(tmp_path)):
        with pytest.raises(ModuleNotFoundError, match=r'^LoRA adapters need peft: pip install "loopitr\[lora\]"$'):
            attempt()
