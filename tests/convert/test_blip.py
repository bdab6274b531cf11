"""BLIP checkpoints of transformers: the numbers of `BlipForImageTextRetrieval`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.support import images, ragged_texts
from helpers.tiny_blip import TEXT, VISION, actual, assert_equal, blip, expected, saved
from transformers import BertConfig, BertModel, BlipConfig, BlipForConditionalGeneration

from loopitr import LoopITRModel
from loopitr.convert.blip import convert_blip

# transformers


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
def test_transformers_numbers(tmp_path: Path, act: str) -> None:
    theirs, folder = saved(tmp_path, vision={**VISION, "hidden_act": act})
    batch = (images(3), *ragged_texts(9))
    model = convert_blip(folder)
    assert not model.training and model.config.fusion["style"] == "shared"
    assert_equal(actual(model, *batch), expected(theirs, *batch))
    model.save_pretrained(tmp_path / "ours")
    assert_equal(actual(LoopITRModel.from_pretrained(tmp_path / "ours"), *batch), expected(theirs, *batch))


@pytest.mark.slow
def test_transformers_numbers_at_base_width(tmp_path: Path) -> None:
    """The widths and heads of the public models; few layers, words and pixels (all twelve were measured by hand)."""
    vision = {"image_size": 32, "num_hidden_layers": 2, "initializer_range": 0.02}
    text = {"vocab_size": 100, "num_attention_heads": 12, "num_hidden_layers": 2}
    theirs, folder = saved(tmp_path, vision=vision, text=text)
    batch = (images(2), *ragged_texts(2))
    assert_equal(actual(convert_blip(folder), *batch), expected(theirs, *batch))


def test_the_source_precision_does_not_matter(tmp_path: Path) -> None:
    theirs = blip().bfloat16()
    theirs.save_pretrained(tmp_path)
    batch = (images(2), *ragged_texts(3))
    model = convert_blip(str(tmp_path))
    assert model.dtype == torch.float32
    assert_equal(actual(model, *batch), expected(theirs.float(), *batch))


@pytest.mark.parametrize("size", [16, 48])
def test_image_size_as_transformers_interpolates(tmp_path: Path, size: int) -> None:
    theirs, folder = saved(tmp_path)
    batch = (images(2, size), *ragged_texts(3))
    model = convert_blip(folder, image_size=size)
    assert model.config.vision["image_size"] == size
    assert_equal(actual(model, *batch), expected(theirs, *batch, interpolate_pos_encoding=True))


def test_heads_and_temperature_come_from_the_config_unless_given(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    model = convert_blip(folder)
    assert (model.config.vision["kwargs"]["num_heads"], model.config.text["num_attention_heads"]) == (4, 3)
    assert model.dual.scale.item() == pytest.approx(math.exp(2.6592))
    assert model.dual.scale.item() == pytest.approx(1 / model.config.initial_temperature)
    other = convert_blip(folder, vision_heads=2, text_heads=6)
    assert (other.config.vision["kwargs"]["num_heads"], other.config.text["num_attention_heads"]) == (2, 6)


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(ValueError, match="holds a 'bert' model, wanted 'blip'"):
        convert_blip(str(tmp_path / "bert"))
    config = BlipConfig(vision_config=VISION, text_config=TEXT)
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "captions")
    with pytest.raises(ValueError, match=r"missing itm_head.bias.*left over text_decoder\.bert"):
        convert_blip(str(tmp_path / "captions"))
    with pytest.raises(OSError, match="no weights for"):
        convert_blip(str(tmp_path / "nowhere"))
