"""Configurations: round trips, defaults that stay untouched, and one-line errors that name the wrong value."""

from __future__ import annotations

import pytest
from helpers.support import BERT, VIT, tiny_config

from loopitr import DualEncoderConfig, LoopITRConfig
from loopitr.models.config import FUSION_DEFAULTS, VISION_DEFAULTS


@pytest.mark.parametrize("kind", [DualEncoderConfig, LoopITRConfig])
def test_json_round_trip(kind, tmp_path):
    config = kind(vision=VIT, text=BERT, vision_pooling="first", text_pooling="backbone", embed_dim=24)
    config.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    ours, theirs = config.to_dict(), loaded.to_dict()
    assert {k: v for k, v in theirs.items() if k != "transformers_version"} == {
        k: v for k, v in ours.items() if k != "transformers_version"
    }
    assert (loaded.vision, loaded.text, loaded.embed_dim) == (config.vision, config.text, 24)


def test_defaults_are_filled_in_and_stay_as_they_are():
    before = dict(FUSION_DEFAULTS), dict(VISION_DEFAULTS)
    config = LoopITRConfig(fusion={"num_layers": 3}, vision={"name": "resnet10t"})
    assert config.fusion == {**FUSION_DEFAULTS, "num_layers": 3}
    assert config.vision == {**VISION_DEFAULTS, "name": "resnet10t"}
    config.fusion["style"], config.vision["image_size"] = "shared", 8
    assert (dict(FUSION_DEFAULTS), dict(VISION_DEFAULTS)) == before


def test_the_callers_dicts_are_copied():
    vision, text = dict(VIT), dict(BERT)
    config = LoopITRConfig(vision=vision, text=text)
    config.vision["image_size"], config.text["vocab_size"] = 8, 8
    assert (vision, text) == (VIT, BERT)


def test_dual_config_is_the_same_without_fusion():
    changed = {"projection": "linear", "initial_temperature": 0.05, "initial_logit_bias": -10.0}
    config = tiny_config(vision_pooling="mean", **changed)
    dual = config.dual_config()
    assert type(dual) is DualEncoderConfig and not hasattr(dual, "fusion")
    for name in ("vision", "text", "vision_pooling", "text_pooling", "embed_dim", *changed):
        assert getattr(dual, name) == getattr(config, name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vision": {"size": 224}}, "unknown vision option 'size'"),
        ({"vision": {"image_size": 0}}, "vision.image_size must be a positive integer, got 0"),
        ({"vision": {"image_size": 1}}, "vision.image_size must be at least 2, got 1"),
        ({"vision": {"image_size": "224"}}, "vision.image_size must be a positive integer, got '224'"),
        ({"text": {"vocab_size": 60}}, "text needs a model_type"),
        ({"embed_dim": -1}, "embed_dim must be a positive integer, got -1"),
        ({"embed_dim": True}, "embed_dim must be a positive integer, got True"),
        ({"vision_pooling": "max"}, "vision_pooling must be one of first, mean, backbone, got 'max'"),
        ({"text_pooling": "cls"}, "text_pooling must be one of first, mean, backbone, got 'cls'"),
        ({"projection": "deep"}, "projection must be one of affine, linear, none, mlp, got 'deep'"),
        ({"initial_temperature": 0.0}, "initial_temperature must be above 0 and finite, got 0.0"),
        ({"initial_temperature": float("inf")}, "initial_temperature must be above 0 and finite, got inf"),
        ({"vision": {"kwargs": {"in_chans": 1}}}, "images have 3 channels, got vision.kwargs.in_chans 1"),
        ({"fusion": {"layers": 2}}, "unknown fusion option 'layers'"),
        ({"fusion": {"style": "early"}}, "fusion.style must be one of late, shared, got 'early'"),
        ({"fusion": {"num_layers": 0}}, "fusion.num_layers 0 needs fusion.agreement"),
        ({"fusion": {"agreement": 0}}, "fusion.agreement must be a positive integer, got 0"),
        ({"fusion": {"agreement": True}}, "fusion.agreement must be a positive integer, got True"),
        ({"fusion": {"num_heads": 1.5}}, "fusion.num_heads must be a positive integer, got 1.5"),
    ],
)
def test_a_wrong_value_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoopITRConfig(**options)
