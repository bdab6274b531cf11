"""Encoding, freezing and resizing whole models."""

from __future__ import annotations

import pytest
import torch
from helpers.support import CNN, VIT, images, plain_score, ragged_texts, tiny_model
from helpers.tiny_outputs import PAIRS, VISION, assert_same_tensors, outputs

from loopitr import DualEncoder, LoopITRModel

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
        model.fusion.image_positions[:, 0] = 5.0  # This is the class token's position.
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


@torch.no_grad()
def test_similarities_are_exact_under_autocast():
    model, (ids, mask) = tiny_model().eval(), ragged_texts(5)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images(4), ids, mask)
    exact = model.dual.scale * output.image_embeds.float() @ output.text_embeds.float().T
    torch.testing.assert_close(output.logits_per_image, exact)
