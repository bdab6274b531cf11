"""LoopITR -> transformers' BLIP: what comes back loads, gives the same numbers and, from BLIP, the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.support import BERT, CNN, VIT, images, ragged_texts, tiny_model
from helpers.tiny_blip import actual, assert_equal, expected, saved
from PIL import Image
from transformers import AutoProcessor, BlipForImageTextRetrieval, BlipProcessor

from loopitr import LoopITRModel, LoopITRProcessor
from loopitr.convert.blip import convert_blip
from loopitr.convert.to_blip import to_blip
from loopitr.models.processing import image_processor, word_tokenizer

FITTING: dict[str, Any] = {"style": "shared", "layers": 2, "vision_pooling": "first", "text_pooling": "first"}


def fitting_model(**changes: Any) -> LoopITRModel:
    """Trained here, not converted: two token types, an eps and an activation of timm's."""
    return tiny_model(**{**FITTING, **changes}).eval()


def with_kwargs(**kwargs: Any) -> dict[str, Any]:
    return {**VIT, "kwargs": {**VIT["kwargs"], **kwargs}}


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    theirs, folder = saved(tmp_path)
    to_blip(convert_blip(folder), tmp_path / "back")
    back = BlipForImageTextRetrieval.from_pretrained(tmp_path / "back")
    weights = back.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(weights[name], value), name
    for part in ("vision_config", "text_config"):
        got, wanted = getattr(back.config, part).to_dict(), getattr(theirs.config, part).to_dict()
        assert got | {"dtype": None} == wanted | {"dtype": None}
    assert back.config.logit_scale_init_value == pytest.approx(theirs.config.logit_scale_init_value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision": with_kwargs(act_layer="gelu_tanh", norm_eps=1e-3, mlp_ratio=2.5, drop_path_rate=0.1)},
        {"vision_pooling": "backbone", "mlm_head": True, "initial_logit_bias": -10.0},
    ],
    ids=["plain", "vision arguments", "heads of training"],
)
def test_a_model_trained_here_has_equal_outputs(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = fitting_model(**changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_blip(model, tmp_path)
    theirs, report = BlipForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    batch = (images(3), *ragged_texts(9))
    assert_equal(actual(model, *batch), expected(theirs.eval(), *batch))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_temperature_goes_along(tmp_path: Path) -> None:
    model = fitting_model()
    with torch.no_grad():
        model.dual.logit_scale.fill_(3.25)
    to_blip(model, tmp_path)
    assert convert_blip(str(tmp_path)).dual.logit_scale.item() == pytest.approx(3.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "late"}, "fusion.style 'late', wanted 'shared'"),
        ({"layers": 1}, "fusion.num_layers 1, wanted 2"),
        ({"fusion": {"layer_norm_eps": 1e-5}}, "fusion.layer_norm_eps 1e-05, wanted 1e-12"),
        ({"fusion": {"image_positions": True}}, "fusion.image_positions True"),
        ({"fusion": {"agreement": 12}}, "fusion.agreement 12, wanted None"),
        ({"fusion": {"first_token_id": 3}}, "fusion.first_token_id 3, wanted None"),
        ({"text": {**BERT, "model_type": "roberta", "pad_token_id": 1}}, "text model 'roberta', wanted 'bert'"),
        ({"text_pooling": "mean"}, "text_pooling 'mean', wanted 'first'"),
        ({"vision_pooling": "mean"}, "vision_pooling 'mean', wanted 'first'"),
        ({"projection": "linear"}, "projection 'linear', wanted 'affine'"),
        ({"vision": CNN, "vision_pooling": "backbone"}, "image backbone 'ResNet', wanted 'VisionTransformer'"),
        ({"vision": with_kwargs(global_pool="avg"), "vision_pooling": "backbone"}, "vision_pooling 'backbone'"),
        ({"vision": with_kwargs(reg_tokens=2)}, "image register tokens 2, wanted 0"),
        ({"vision": with_kwargs(no_embed_class=True)}, "number of image positions 16, wanted 17"),
        ({"vision": with_kwargs(pre_norm=True)}, "image norm_pre 'LayerNorm', wanted 'Identity'"),
        ({"vision": with_kwargs(final_norm=False)}, "image final norm 'Identity', wanted 'LayerNorm'"),
        ({"vision": with_kwargs(init_values=0.1)}, "image blocks.0.ls1 'LayerScale', wanted 'Identity'"),
        ({"vision": with_kwargs(qk_norm=True)}, "image blocks.0.attn.q_norm 'LayerNorm', wanted 'Identity'"),
        ({"vision": with_kwargs(act_layer="elu")}, "image activation 'ELU', wanted 'gelu'"),
        ({"vision": with_kwargs(qkv_bias=False)}, r"missing vision_model\.encoder\.layers\.0\.self_attn\.qkv\.bias"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_blip(fitting_model(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_are_to_be_merged_first(tmp_path: Path) -> None:
    model = fitting_model()
    model.config.lora = {"text": {"r": 2}}
    with pytest.raises(ValueError, match="merge them first"):
        to_blip(model, tmp_path / "out")


def own_processor(**changes: Any) -> LoopITRProcessor:
    pixels = image_processor(32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear")
    for name, value in changes.items():
        setattr(pixels, name, value)
    return LoopITRProcessor(pixels, word_tokenizer(["a", "red", "cat"], max_length=8))


def test_the_processor_goes_along(tmp_path: Path) -> None:
    processor = own_processor()
    to_blip(fitting_model(), tmp_path, processor=processor)
    theirs = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(theirs, BlipProcessor)
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    inputs = {"images": Image.fromarray(noise), "text": ["a red cat", "cat"], "return_tensors": "pt"}
    got, wanted = theirs(padding=True, **inputs), processor(**inputs)
    assert sorted(got) == sorted(wanted)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])


def test_a_processor_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do_center_crop True, wanted False"):
        to_blip(fitting_model(), tmp_path / "out", processor=own_processor(do_center_crop=True))
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_not_overwritten(tmp_path: Path) -> None:
    model = fitting_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'loopitr' model.*choose another folder"):
        to_blip(model, tmp_path)
    assert LoopITRModel.from_pretrained(tmp_path)
