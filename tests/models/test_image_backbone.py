"""Image backbones: layouts, poolings, sizes, and errors that name what is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.support import BERT, CNN, VIT, images, tiny_model
from safetensors.torch import load_file

from loopitr import DualEncoderConfig, LoopITRModel
from loopitr.models import image_backbone
from loopitr.models.image_backbone import VisionBackbone, fit_weights, vision_data

SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "image_size": 32,
    "kwargs": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
}
NO_CLASS_TOKEN: dict[str, Any] = {**VIT, "kwargs": {**VIT["kwargs"], "class_token": False, "global_pool": "avg"}}
CLIP_RESNET: dict[str, Any] = {"name": "resnet50_clip", "image_size": 64, "kwargs": {"width_factor": 0.125}}
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TOWERS: dict[str, dict[str, Any]] = {  # These are the ViTs of CLIP, SigLIP, SigLIP 2 and DINO, small.
    "clip": {"name": "vit_base_patch16_clip_quickgelu_224", "image_size": 32, "kwargs": TINY},
    "siglip": {"name": "vit_base_patch16_siglip_224", "image_size": 32, "kwargs": TINY},
    "siglip2": {"name": "vit_so400m_patch16_siglip_256", "image_size": 32, "kwargs": TINY},
    "dinov2": {"name": "vit_small_patch14_reg4_dinov2", "image_size": 32, "kwargs": TINY},
    "dinov3": {"name": "vit_small_patch16_dinov3", "image_size": 32, "kwargs": TINY},
}
PREFIX = {"vit": 1, "clip": 1, "dinov2": 5, "dinov3": 5}  # The prefix is a class token and registers.
VISION = {"vit": VIT, "no_class_token": NO_CLASS_TOKEN, "cnn": CNN, "swin": SWIN, **TOWERS}


def vision_backbone(vision: dict[str, Any], pooling: str = "backbone") -> VisionBackbone:
    torch.manual_seed(0)
    return VisionBackbone(DualEncoderConfig(vision=vision, text=BERT, vision_pooling=pooling)).eval()


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_tokens_are_timms_features_row_by_row(name):
    backbone = vision_backbone(VISION[name])
    x = images(2, backbone.image_size)
    # The other layout of the same numbers has other last bits.
    features, tokens = backbone.model.forward_features(x.contiguous(memory_format=backbone.memory_format)), backbone(x)
    assert tokens.shape == (2, backbone.num_tokens, backbone.width)
    if name == "cnn":
        features = features.permute(0, 2, 3, 1)
    if features.ndim == 4:
        height, width = features.shape[1:3]
        expected = torch.stack([features[:, i, j] for i in range(height) for j in range(width)], 1)
    else:
        expected = features
    assert torch.equal(tokens, expected)
    assert backbone.num_prefix_tokens == PREFIX.get(name, 0)


CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "resnet": CNN,
    "clip_resnet": CLIP_RESNET,
    "efficientnet": {"name": "tf_efficientnet_lite0", "image_size": 64, "kwargs": {"drop_path_rate": 0.0}},
    "convnext": {
        "name": "convnext_atto",
        "image_size": 64,
        "kwargs": {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    },
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_side_by_side_give_the_tokens_and_gradients_of_the_plain_layout(name, training):
    backbone = vision_backbone(CONVOLUTIONAL[name]).double().train(training)
    assert backbone.memory_format == torch.channels_last
    x, gradients, outputs, strides = images(4, backbone.image_size).double(), [], [], []
    seen = next(m for m in backbone.model.modules() if isinstance(m, torch.nn.Conv2d))
    seen.register_forward_pre_hook(lambda _, arguments: strides.append(arguments[0].stride(1)))
    statistics = copy.deepcopy(dict(backbone.named_buffers()))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        backbone.load_state_dict(statistics, strict=False)
        backbone.memory_format = memory_format
        outputs.append(backbone(x))
        weights = [p for p in backbone.parameters() if p.requires_grad]
        of_weights = torch.autograd.grad(backbone.pool(outputs[-1]).square().sum(), weights, allow_unused=True)
        gradients.append([g for g in of_weights if g is not None])
    assert strides[0] > 1 and strides[-1] == 1  # the layout reaches the convolutions
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert outputs[1].is_contiguous()  # so that tokens cost no copy


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_other_backbones_keep_the_plain_layout(name):
    assert vision_backbone(VISION[name]).memory_format == torch.contiguous_format


def test_a_network_that_cannot_run_with_channels_side_by_side_keeps_the_plain_layout(monkeypatch):
    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward_features(self, x):
            return x.view(len(x), -1).view(x.shape) * self.weight

    monkeypatch.setattr(image_backbone, "create_timm", lambda *_, **__: Rows())
    config = DualEncoderConfig(vision={"name": "rows", "image_size": 8}, text=BERT, vision_pooling="mean")
    backbone = VisionBackbone(config)
    x = images(2, 8)
    assert torch.equal(backbone(x), x.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_weights_of_a_convolutional_backbone_are_saved_in_the_plain_layout(tmp_path):
    model = tiny_model(CNN).eval()
    model.get_image_features(images(2, 64))
    model.save_pretrained(tmp_path)
    loaded = LoopITRModel.from_pretrained(tmp_path).eval()
    saved = load_file(tmp_path / "model.safetensors")
    kept, again = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(kept[name], value) and torch.equal(again[name], value) for name, value in saved.items())
    assert all(value.is_contiguous() for state in (kept, again) for value in state.values())
    assert loaded.dual.vision.memory_format == torch.channels_last
    assert torch.equal(loaded.get_image_features(images(2, 64)), model.get_image_features(images(2, 64)))


@pytest.mark.parametrize("name", [*VISION, "clip_resnet"])
@torch.no_grad()
def test_pooling_stored_tokens_is_timms_own_forward(name):
    """`clip_resnet`: its attention pooling has positions, so that the map must come back in its own shape."""
    backbone = vision_backbone({**VISION, "clip_resnet": CLIP_RESNET}[name])
    x = images(2, backbone.image_size)
    pooled = backbone.pool(backbone(x).clone())
    torch.testing.assert_close(pooled, backbone.model(x), atol=1e-6, rtol=1e-5)
    assert pooled.shape == (2, backbone.pooled_width)


@torch.no_grad()
def test_first_and_mean_pooling():
    tokens = torch.randn(2, 17, 32)
    assert torch.equal(vision_backbone(VIT, "first").pool(tokens), tokens[:, 0])
    assert torch.equal(vision_backbone(VIT, "mean").pool(tokens), tokens[:, 1:].mean(1))  # The class token is left out.
    assert torch.equal(vision_backbone(NO_CLASS_TOKEN, "mean").pool(tokens), tokens.mean(1))
    # So are the registers.
    assert torch.equal(vision_backbone(TOWERS["dinov2"], "mean").pool(tokens), tokens[:, 5:].mean(1))


@pytest.mark.parametrize("name", ["cnn", "swin", "no_class_token", "siglip"])
def test_first_pooling_needs_a_class_token(name):
    with pytest.raises(ValueError, match=f"'first' needs a class token.*'{VISION[name]['name']}'"):
        vision_backbone(VISION[name], "first")


def test_a_wrong_name_patch_or_picture_is_named():
    with pytest.raises(ValueError, match="timm has no model 'vit_tinny_patch16_224'; similar: "):
        vision_backbone({**VIT, "name": "vit_tinny_patch16_224"})
    with pytest.raises(ValueError, match="image size 36 is not a multiple of the patch size 8"):
        vision_backbone({**VIT, "image_size": 36})
    backbone = vision_backbone(VIT)
    for wrong in (images(2, 40), torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32)):
        with pytest.raises(ValueError, match=r"pixel_values must be \[B, 3, 32, 32\], got"):
            backbone(wrong)


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_resize_to_the_same_size_changes_nothing(name):
    backbone = vision_backbone(VISION[name])
    x, before = images(2, backbone.image_size), {k: v.clone() for k, v in backbone.state_dict().items()}
    tokens = backbone(x)
    backbone.resize(backbone.image_size)
    assert torch.equal(backbone(x), tokens)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    "name, tokens",
    [("vit", 65), ("no_class_token", 64), ("cnn", 16), ("siglip", 64), ("dinov2", 69), ("dinov3", 69)],
)
@torch.no_grad()
def test_resize_to_another_size(name, tokens):
    backbone = vision_backbone(VISION[name])
    size = backbone.image_size * 2
    backbone.resize(size)
    got = backbone(images(2, size))
    assert got.shape == (2, tokens, backbone.width) and backbone.num_tokens == tokens
    assert backbone.pool(got).shape == (2, backbone.pooled_width)


def test_positions_are_interpolated():
    """A linear ramp stays a linear ramp away from the border, and the class token's position stays."""
    backbone = vision_backbone(VIT)
    position = backbone.model.pos_embed
    with torch.no_grad():
        position.zero_()
        position[:, 0] = 7.0
        position[0, 1:, 0] = torch.arange(4.0).repeat_interleave(4)  # The positions grow downwards.
    backbone.resize(64)
    grid = backbone.model.pos_embed[0, 1:, 0].reshape(8, 8)
    assert torch.equal(backbone.model.pos_embed[0, 0], position[0, 0])
    torch.testing.assert_close(grid, grid[:, :1].expand(8, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(grid[3:5, 0], torch.tensor([1.25, 1.75]), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="image size 60 is not a multiple of the patch size 8"):
        backbone.resize(60)
    assert backbone.image_size == 64


def test_resize_keeps_the_dtype():
    backbone = vision_backbone(VIT).double()
    backbone.resize(64)
    assert backbone(images(1, 64).double()).dtype == torch.float64


def test_a_backbone_whose_windows_would_change_is_refused():
    with pytest.raises(ValueError, match="SwinTransformer cannot change its image size from 32 to 64"):
        vision_backbone(SWIN).resize(64)


def test_how_a_backbone_wants_its_pixels():
    data = vision_data("vit_small_patch16_224")
    assert data.mean == (0.5, 0.5, 0.5) and data.std == (0.5, 0.5, 0.5) and data.interpolation == "bicubic"
    assert vision_data("resnet10t").mean != data.mean


def test_building_a_model_leaves_timms_initialisation_alone():
    """A ResNet zeroes the last norm of each block; transformers' initialisation would fill it with ones."""
    torch.manual_seed(0)
    model = LoopITRModel(tiny_model(CNN).config)
    last_norms = [v for k, v in model.dual.vision.model.named_parameters() if "layer" in k and k.endswith("bn2.weight")]
    assert last_norms and all(not value.any() for value in last_norms)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_saved_tower_comes_back_the_same(name, tmp_path):
    model = tiny_model(TOWERS[name]).eval()
    model.save_pretrained(tmp_path)
    loaded = LoopITRModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.get_image_features(images(2)), model.get_image_features(images(2)))


@pytest.mark.parametrize("name", ["siglip", "dinov2", "dinov3"])
@torch.no_grad()
def test_a_local_file_of_another_resolution_fits(name):
    """As resizing does it."""
    backbone, larger = vision_backbone(TOWERS[name]), vision_backbone({**TOWERS[name], "image_size": 48})
    larger.model.load_state_dict(fit_weights(larger.model, dict(backbone.model.state_dict())), strict=True)
    backbone.resize(48)
    torch.testing.assert_close(larger(images(2, 48)), backbone(images(2, 48)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vision", [{"name": "convnext_atto"}, {"name": "mobilenetv3_small_050"}, TOWERS["siglip"]])
def test_a_head_that_pooling_goes_past_is_not_trained(vision):
    """DDP wants a gradient of every trained parameter."""
    backbone = VisionBackbone(DualEncoderConfig(vision={"image_size": 64, **vision}, vision_pooling="mean"))
    backbone.pool(backbone(images(2, backbone.image_size))).sum().backward()
    parameters = dict(backbone.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in parameters.values())
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    assert frozen and all("head" in name or "attn_pool" in name for name in frozen)
