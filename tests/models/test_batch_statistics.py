"""Batch norm of an image backbone that comes with weights goes by its own statistics, while its weights train."""

from __future__ import annotations

import pytest
import torch
from helpers.support import images
from helpers.tiny_building import CNN, save_tiny, scratch
from helpers.tiny_run import run, weights
from torch.nn.modules.batchnorm import _BatchNorm

from loopitr import LoopITRModel
from loopitr.building.build import build_model
from loopitr.building.options import ModelOptions, VisionOptions
from loopitr.data import scene_vocabulary


def built(options: ModelOptions) -> LoopITRModel:
    return build_model(options, vocabulary=scene_vocabulary())[0].train()


def norms(model: LoopITRModel) -> list[torch.nn.Module]:
    return [module for module in model.dual.vision.modules() if isinstance(module, _BatchNorm)]


def a_step(model: LoopITRModel) -> None:
    model.encode_images(images(4)).embeds.sum().backward()


@pytest.mark.parametrize("hold", [True, False])
def test_only_the_statistics_stay(hold):
    model = built(scratch(hold_batch_statistics=hold))
    actual = norms(model)
    assert actual and all(norm.training != hold for norm in actual) and model.dual.vision.training
    before = [norm.running_mean.clone() for norm in actual]
    a_step(model)
    assert all(norm.weight.grad is not None for norm in actual)
    assert [torch.equal(norm.running_mean, mean) for norm, mean in zip(actual, before)] == [hold] * len(actual)
    model.eval().train()
    assert all(norm.training != hold for norm in actual)


def test_held_statistics_make_an_image_independent_of_its_batch():
    model = built(scratch(hold_batch_statistics=True))
    together, alone = model.encode_images(images(4)).embeds, model.encode_images(images(4)[:1]).embeds
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


def test_by_default_they_stay_where_weights_were_given(tmp_path):
    model = built(scratch())
    assert not model.dual.vision.hold_statistics  # The model starts from scratch.
    torch.save(model.dual.vision.model.state_dict(), tmp_path / "cnn.pth")
    vision = VisionOptions(name="resnet10t", image_size=32, pretrained=False, kwargs=CNN)
    vision.checkpoint = str(tmp_path / "cnn.pth")
    assert built(scratch(vision=vision)).dual.vision.hold_statistics
    assert not built(scratch(vision=vision, hold_batch_statistics=False)).dual.vision.hold_statistics
    assert built(ModelOptions(init=save_tiny(tmp_path / "saved"))).dual.vision.hold_statistics


@pytest.mark.slow
def test_a_run_keeps_them(tmp_path):
    """From scratch a run moves them; going on from its model, the next one does not, yet trains the convolutions."""
    run(tmp_path / "first", train__max_steps=2)
    run(tmp_path / "second", train__max_steps=2, model__init=str(tmp_path / "first" / "run"))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    means = [name for name in first if name.startswith("dual.vision") and name.endswith("running_mean")]
    convolutions = [name for name in first if name.startswith("dual.vision") and first[name].ndim == 4]
    assert means and all(torch.equal(first[name], second[name]) for name in means)
    assert convolutions and not any(torch.equal(first[name], second[name]) for name in convolutions)
    assert any(first[name].any() for name in means)
