"""A backbone without its batch norms gives the same tokens, or is not used."""

import pytest
import torch

from loopitr.models import folding
from loopitr.models.config import DualEncoderConfig
from loopitr.models.folding import WORTHWHILE, folded
from loopitr.models.image_backbone import VisionBackbone


def backbone(name, size=64):
    config = DualEncoderConfig(
        vision={"name": name, "image_size": size}, text={"model_type": "bert"}, vision_pooling="mean"
    )
    torch.manual_seed(0)
    vision = VisionBackbone(config)
    for module in vision.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.running_mean, -1, 1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)
    return vision.eval()


def norms(vision):
    return sum(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in vision.modules())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
@torch.no_grad()
def test_tokens_stay_and_batch_norms_go(name):
    vision, pixels = backbone(name), torch.randn(3, 3, 64, 64)
    weights = {key: value.clone() for key, value in vision.state_dict().items()}
    copied = folded(vision, WORTHWHILE)
    assert norms(vision) > 5 and norms(copied) == 0
    wanted = vision(pixels)
    assert (copied(pixels) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert all(torch.equal(value, weights[key]) for key, value in vision.state_dict().items())


@torch.no_grad()
def test_a_network_whose_tokens_would_change_stays(monkeypatch):
    vision = backbone("test_resnet")
    merge = folding._merge

    def wrong(convolution, norm):
        merge(convolution, norm)
        convolution.bias.data += 0.1  # as if something between the two had been missed

    monkeypatch.setattr(folding, "_merge", wrong)
    assert folded(vision, WORTHWHILE) is vision


def test_where_it_does_not_pay():
    vision = backbone("test_efficientnet")
    assert folded(vision, WORTHWHILE - 1) is vision
    assert folded(vision.train(), WORTHWHILE) is vision
    assert folded(vision.eval().bfloat16(), WORTHWHILE).model is vision.model
    with torch.autocast("cpu"):
        assert folded(vision.float(), WORTHWHILE) is vision
    transformer = backbone("test_vit", 160)
    assert folded(transformer, WORTHWHILE) is transformer
