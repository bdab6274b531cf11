"""Saving and loading: to the bit, and folders that are not what they should be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.support import BERT, VIT, images, ragged_texts, tiny_model
from helpers.tiny_outputs import VISION, assert_same_tensors, outputs
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

from loopitr import DualEncoder, DualEncoderConfig, LoopITRConfig, LoopITRModel


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
        model.encode_images(images(4, 64))  # The statistics differ from those of a new model.
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


def test_token_agreement_is_saved_and_a_folder_older_than_it_loads(saved, tmp_path):
    model = tiny_model(fusion={"agreement": 12}).eval()
    model.save_pretrained(tmp_path / "new")
    loaded = LoopITRModel.from_pretrained(tmp_path / "new")
    assert loaded.agreement is not None
    assert_same_tensors(model, loaded)
    for ours, theirs in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(ours, theirs)
    assert not any("agreement" in name for name in loaded.dual_encoder().state_dict())
    old = tmp_path / "old"
    shutil.copytree(saved[1], old)
    config = json.loads((old / "config.json").read_text())
    assert config["fusion"].pop("agreement") is None
    (old / "config.json").write_text(json.dumps(config))
    loaded = LoopITRModel.from_pretrained(old)
    assert loaded.agreement is None and loaded.config.fusion["agreement"] is None
    for ours, theirs in zip(outputs(saved[0]), outputs(loaded), strict=True):
        assert torch.equal(ours, theirs)


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


def test_a_subfolder_may_hold_the_model(saved, tmp_path):
    model, folder = saved
    shutil.copytree(folder, tmp_path / "best")
    assert_same_tensors(model, LoopITRModel.from_pretrained(tmp_path, subfolder="best"))


def test_loading_info_is_still_to_be_had(saved):
    loaded, info = LoopITRModel.from_pretrained(saved[1], output_loading_info=True)
    assert isinstance(loaded, LoopITRModel) and not info["missing_keys"]


def test_what_is_not_trained_is_not_after_loading_either(tmp_path):
    """A SigLIP tower's pooling head, where the mean is taken: DDP would wait for its gradient for ever."""
    siglip = {"name": "vit_base_patch16_siglip_224", "image_size": 32, "kwargs": VIT["kwargs"]}
    model = tiny_model(siglip, vision_pooling="mean")
    model.save_pretrained(tmp_path)
    loaded = LoopITRModel.from_pretrained(tmp_path)
    still = [{name for name, p in m.named_parameters() if not p.requires_grad} for m in (model, loaded)]
    assert still[0] == still[1] != set()
    assert all(name.startswith("dual.vision.model.attn_pool.") for name in still[0])


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
