"""Saving, loading, freezing and resizing whole models."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import BERT, CNN, VIT, images, plain_score, ragged_texts, tiny_model
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

from loopitr import DualEncoder, DualEncoderConfig, LoopITRConfig, LoopITRModel

SWIN: dict[str, Any] = {  # its window indices and masks are in no checkpoint
    "name": "swin_tiny_patch4_window7_224",
    "image_size": 32,
    "kwargs": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
}
VISION = {"vit": VIT, "cnn": CNN, "swin": SWIN}
PAIRS = torch.tensor([[0, 1], [2, 0], [1, 4], [2, 3]])


@torch.no_grad()
def outputs(model: LoopITRModel) -> list[torch.Tensor]:
    image_state = model.encode_images(images(3, model.dual.vision.image_size))
    text_state = model.encode_texts(*ragged_texts(5))
    scores = model.score_pairs(image_state, text_state, PAIRS).logits
    return [image_state.embeds, image_state.tokens, text_state.embeds, text_state.tokens, scores]


def assert_same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(a, kind)()), dict(getattr(b, kind)())
        assert ours.keys() == theirs.keys()
        assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model().eval()
    model.save_pretrained(folder)
    return model, folder


# Saving and loading


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("vision", VISION)
def test_save_and_load_is_exact_to_the_bit(vision, style, tmp_path):
    model = tiny_model(VISION[vision], style, mlm_head=True)
    if vision == "cnn":
        model.train()
        model.encode_images(images(4, 64))  # running statistics of their own
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = LoopITRModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert_same_tensors(model, loaded)
    for ours, theirs in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(ours, theirs)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, again))
    assert first == second


def test_a_loaded_model_lives_without_its_folder(tmp_path):
    """Training writes the folder that it started from: weights must not be a view of the file."""
    tiny_model(seed=1).save_pretrained(tmp_path)
    loaded = LoopITRModel.from_pretrained(tmp_path)
    before = outputs(loaded)
    tiny_model(seed=2).save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(b"\0" * weights.stat().st_size)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(loaded), strict=True))
    assert all(parameter.data_ptr() % 16 == 0 for parameter in loaded.parameters())


def test_loads_as_bfloat16(saved):
    model, folder = saved
    loaded = LoopITRModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    embeds = loaded.get_image_features(images(3).bfloat16())
    torch.testing.assert_close(embeds.float(), outputs(model)[0], atol=0.03, rtol=0)


def test_auto_classes_know_both_models(saved, tmp_path):
    model, folder = saved
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is LoopITRConfig and config.fusion == model.config.fusion
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is LoopITRModel
    assert_same_tensors(model, loaded)
    model.dual_encoder().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DualEncoderConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is DualEncoder


def test_a_subfolder_is_found(saved, tmp_path):
    model, folder = saved
    shutil.copytree(folder, tmp_path / "best")
    assert_same_tensors(model, LoopITRModel.from_pretrained(tmp_path, subfolder="best"))


def test_loading_info_is_still_to_be_had(saved):
    loaded, info = LoopITRModel.from_pretrained(saved[1], output_loading_info=True)
    assert isinstance(loaded, LoopITRModel) and not info["missing_keys"]


# The dual encoder alone


def test_dual_encoder_shares_the_weights():
    model = tiny_model().eval()
    dual = model.dual_encoder()
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in dual.parameters())
    with torch.no_grad():
        before = dual.get_image_features(images(2))
        model.dual.vision_projection.weight.add_(1)
        assert not torch.equal(before, dual.get_image_features(images(2)))


@pytest.mark.parametrize("style", ["late", "shared"])
@pytest.mark.parametrize("vision", VISION)
@torch.no_grad()
def test_a_saved_dual_encoder_has_no_fusion_and_the_same_embeds(vision, style, tmp_path):
    model = tiny_model(VISION[vision], style, mlm_head=True).eval()
    model.dual_encoder().save_pretrained(tmp_path)
    keys = load_file(next(tmp_path.glob("*.safetensors"))).keys()
    assert keys and not [key for key in keys if "fusion" in key or "itm" in key or "mlm" in key]
    assert "fusion" not in json.loads((tmp_path / "config.json").read_text())
    dual = DualEncoder.from_pretrained(tmp_path)
    x, texts = images(3, model.dual.vision.image_size), ragged_texts(5)
    assert torch.equal(dual.get_image_features(x), model.get_image_features(x))
    assert torch.equal(dual.get_text_features(*texts), model.get_text_features(*texts))
    assert torch.equal(dual(x, *texts).logits_per_image, model(x, *texts).logits_per_image)
    assert not hasattr(dual, "score_pairs")


# Folders that are not what they should be


def test_a_folder_of_another_kind_is_named(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ValueError, match="holds a 'loopitr' model, DualEncoder loads 'loopitr_dual'"):
        DualEncoder.from_pretrained(folder)
    model.dual_encoder().save_pretrained(tmp_path / "dual")
    with pytest.raises(ValueError, match="holds a 'loopitr_dual' model, LoopITRModel loads 'loopitr'"):
        LoopITRModel.from_pretrained(tmp_path / "dual")
    BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="bert holds a 'bert' model, LoopITRModel loads 'loopitr'"):
        LoopITRModel.from_pretrained(tmp_path / "bert")


def test_no_folder_or_an_empty_one(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        LoopITRModel.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="empty holds no model: it has no config.json"):
        LoopITRModel.from_pretrained(tmp_path / "empty")


def test_missing_or_leftover_weights_are_named(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved[1], folder)
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    lost = {key: value for key, value in weights.items() if key not in ("itm_head.weight", "itm_head.bias")}
    save_file(lost, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys \['itm_head.bias', 'itm_head.weight'\] \(2 in all\)"):
        LoopITRModel.from_pretrained(folder)
    save_file({**weights, "momentum.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected keys \['momentum.weight'\]"):
        LoopITRModel.from_pretrained(folder)


def test_pickled_weights_are_not_read(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved[1], folder)
    path = next(folder.glob("*.safetensors"))
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(OSError, match="safetensors"):
        LoopITRModel.from_pretrained(folder)


# Encoding


def test_embeds_are_unit_length_and_the_temperature_is_clamped():
    model = tiny_model(initial_temperature=0.05).eval()
    x, texts = images(3), ragged_texts(5)
    out = model(x, *texts)
    for embeds in (out.image_embeds, out.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))
    torch.testing.assert_close(model.dual.scale, torch.tensor(20.0))
    torch.testing.assert_close(out.logits_per_image, 20 * out.image_embeds @ out.text_embeds.T)
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)
    with torch.no_grad():
        model.dual.logit_scale.fill_(9.0)
    assert model.dual.scale == 100


@pytest.mark.parametrize("vision", VISION)
@torch.no_grad()
def test_states_from_stored_tokens(vision):
    model = tiny_model(VISION[vision]).eval()
    x, texts = images(3, model.dual.vision.image_size), ragged_texts(5)
    state = model.encode_images(x)
    again = model.image_state(state.tokens.clone())
    assert torch.equal(again.embeds, state.embeds) and torch.equal(again.tokens, state.tokens)
    assert torch.equal(state.embeds, model.get_image_features(x))
    assert torch.equal(model.encode_texts(*texts).embeds, model.get_text_features(*texts))
    projected = model.project_images(state)
    assert model.project_images(projected) is projected


@torch.no_grad()
def test_no_attention_mask_means_every_token_is_real():
    model = tiny_model().eval()
    ids = torch.randint(5, 60, (3, 7))
    assert torch.equal(model.get_text_features(ids), model.get_text_features(ids, torch.ones_like(ids)))
    assert model.encode_texts(ids).mask.all()


@pytest.mark.parametrize("style", ["late", "shared"])
@torch.no_grad()
def test_fused_tokens_start_with_what_is_scored(style):
    model = tiny_model(style=style).eval()
    image_state, text_state = model.encode_images(images(3)), model.encode_texts(*ragged_texts(5))
    pairs = torch.tensor([[0, 1], [0, 3], [2, 0]])
    fused = model.fused_tokens(image_state, text_state, pairs)
    lengths = text_state.mask.sum(1)[pairs[:, 1]]
    assert len(fused) == lengths.sum()
    firsts = fused[lengths.cumsum(0) - lengths]
    expected = plain_score(model, image_state.tokens, text_state, pairs)
    torch.testing.assert_close(model.itm_head(firsts), expected, atol=1e-5, rtol=1e-4)


# Freezing


@pytest.mark.parametrize("names", [["vision"], ["text"], ["dual_head"], ["fusion"], ["vision", "text"]])
def test_frozen_parts_get_no_gradient_and_stay_in_eval_mode(names):
    model = tiny_model(CNN, fusion={"dropout": 0.1}).train()
    model.freeze(names)
    model.train()
    parts = model.parts()
    frozen = {id(p) for name in names for item in parts[name] for p in _parameters(item)}
    for name, items in parts.items():
        for item in items:
            if isinstance(item, torch.nn.Module):
                assert all(module.training == (name not in names) for module in item.modules())
    assert model.training and model.frozen == set(names)
    statistics = model.dual.vision.model.bn1.running_mean.clone()
    image_state, text_state = model.encode_images(images(3, 64)), model.encode_texts(*ragged_texts(5))
    similarity = model.dual.scale * image_state.embeds @ text_state.embeds.T
    (similarity.sum() + model.score_pairs(image_state, text_state, PAIRS).score.sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in frozen), name
    assert torch.equal(statistics, model.dual.vision.model.bn1.running_mean) == ("vision" in names)


def _parameters(item):
    return [item] if isinstance(item, torch.nn.Parameter) else list(item.parameters())


def test_parts_are_the_whole_model_once():
    model = tiny_model(CNN, mlm_head=True)
    listed = [id(p) for items in model.parts().values() for item in items for p in _parameters(item)]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in model.parameters()}


def test_freezing_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="cannot freeze 'decoder'; parts: vision, text, dual_head, fusion"):
        tiny_model().freeze(["decoder"])


# Another image size


@pytest.mark.parametrize("vision", ["vit", "cnn"])
def test_resized_then_saved_then_loaded(vision, tmp_path):
    model = tiny_model(VISION[vision]).eval()
    size = model.dual.vision.image_size
    before = outputs(model)
    model.resize_images(size)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    model.resize_images(2 * size)
    model.save_pretrained(tmp_path / "model")
    model.dual_encoder().save_pretrained(tmp_path / "dual")
    loaded = LoopITRModel.from_pretrained(tmp_path / "model")
    assert loaded.config.vision["image_size"] == loaded.dual.vision.image_size == 2 * size
    assert_same_tensors(model, loaded)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(loaded), strict=True))
    assert_same_tensors(model.dual, DualEncoder.from_pretrained(tmp_path / "dual"))


@pytest.mark.parametrize("vision", ["vit", "cnn"])
def test_what_is_frozen_stays_frozen_when_resized(vision):
    model = tiny_model(VISION[vision], fusion={"image_positions": True})
    model.freeze(["vision", "fusion"])
    model.resize_images(2 * model.dual.vision.image_size)
    training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert training and not [name for name in training if name.startswith(("fusion", "dual.vision."))]


def test_fusion_positions_are_resized_with_the_image():
    model = tiny_model(VIT, fusion={"image_positions": True})
    with torch.no_grad():
        model.fusion.image_positions.fill_(3.0)
        model.fusion.image_positions[:, 0] = 5.0  # the class token's
    model.resize_images(64)
    positions = model.fusion.image_positions
    assert positions.shape == (1, 65, 32)
    assert (positions[:, 0] == 5).all()
    torch.testing.assert_close(positions[:, 1:], torch.full((1, 64, 32), 3.0))


def test_a_size_that_the_patch_does_not_divide_changes_nothing():
    model = tiny_model().eval()
    before = outputs(model)
    with pytest.raises(ValueError, match="image size 36 is not a multiple of the patch size 8"):
        model.resize_images(36)
    assert model.config.vision["image_size"] == 32
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
