"""Matched pairs: what an untrained model starts with is what transformers' `CLIPModel` and `SiglipModel` give."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.step_reference import gradients, step, step_batch
from helpers.support import images, plain_score
from helpers.tiny_building import build as build_scenes
from helpers.tiny_building import save_bert, with_text
from helpers.tiny_gallery import captions, picture
from helpers.tiny_pairs import TEXT, save_pair
from helpers.tiny_texts import ended_texts
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    Siglip2Config,
    SiglipModel,
)

from loopitr import LoopITRModel, LoopITRProcessor
from loopitr.building.build import build_model
from loopitr.building.folders import load_saved
from loopitr.building.options import FusionOptions, ModelOptions
from loopitr.data.collate import Collator
from loopitr.export.dual import export_dual
from loopitr.objective.build import build_objective
from loopitr.objective.options import ObjectiveOptions
from loopitr.objective.word_masking import token_masking
from loopitr.training.optimization import parameter_groups

FUSION = FusionOptions(num_layers=2, num_heads=4, intermediate_size=48, dropout=0.0)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def pair(request, tmp_path_factory) -> str:
    return save_pair(tmp_path_factory.mktemp(request.param), request.param)


def build(name: str, **changes: Any) -> tuple[LoopITRModel, LoopITRProcessor]:
    torch.manual_seed(0)
    model, processor = build_model(ModelOptions(pair=name, fusion=FUSION, **changes))
    return model.eval(), processor


def theirs(name: str) -> Any:
    return (SiglipModel if "siglip" in Path(name).name else CLIPModel).from_pretrained(name).eval()


@torch.no_grad()
def assert_zero_shot(model: Any, name: str, pixels: Tensor, ids: Tensor, mask: Tensor) -> None:
    """SigLIP's texts padded to the full length with the tokenizer's padding token, 0, as it was trained."""
    full = torch.nn.functional.pad(ids, (0, TEXT["max_position_embeddings"] - ids.shape[1]))
    expected = theirs(name)(input_ids=full, pixel_values=pixels)
    output = model(pixels, ids, mask)
    for key in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        torch.testing.assert_close(output[key], expected[key], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.get_image_features(pixels), output.image_embeds)
    assert torch.equal(model.get_text_features(ids, mask), output.text_embeds)
    assert expected.logits_per_image.std() > 0.5


def test_the_start_is_the_zero_shot_model(pair):
    assert_zero_shot(build(pair)[0], pair, images(3), *ended_texts(9, 11))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(
    "vision",
    [
        {"hidden_size": 72, "intermediate_size": 269, "hidden_act": "gelu"},  # 72 * (269 / 72) is below 269
        {"layer_norm_eps": 1e-2, "hidden_act": "gelu_pytorch_tanh"},
        {"patch_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "quick_gelu"},
    ],
)
def test_an_image_tower_of_any_shape(kind, vision, tmp_path):
    name = save_pair(tmp_path / kind, kind, vision)
    assert_zero_shot(build(name)[0], name, images(3), *ended_texts(3, 11))


def test_the_processor_is_the_pairs_own(pair):
    """Captions come with a mask and are padded on the right; the collator's batch is the processor's."""
    model, processor = build(pair)
    texts = list(captions(3, 4))
    inputs = processor(images=[picture(0), picture(1)], text=texts)
    expected = AutoImageProcessor.from_pretrained(pair)([picture(0), picture(1)], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert processor.tokenizer.model_max_length == TEXT["max_position_embeddings"]
    alone = AutoTokenizer.from_pretrained(pair)(texts)["input_ids"]
    assert [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])] == alone
    assert inputs["attention_mask"][:, 0].all() and not inputs["attention_mask"].all()
    assert_zero_shot(model, pair, inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])
    examples = [{"image_tokens": torch.zeros(1), "caption": t, "identity": 0, "skipped": []} for t in texts]
    batch = Collator(processor.tokenizer, max_length=24)(examples).inputs
    assert all(torch.equal(batch[key], inputs[key]) for key in ("input_ids", "attention_mask"))


def test_saved_exported_and_continued_it_stays_the_zero_shot_model(pair, tmp_path):
    model, processor = build(pair)
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    export_dual(str(tmp_path / "run"), tmp_path / "dual")
    texts = ended_texts(9, 11)
    for folder in ("run", "dual"):
        assert_zero_shot(load_saved(tmp_path / folder).model, pair, images(3), *texts)
    again, its_processor = build_model(ModelOptions(init=str(tmp_path / "run")))
    assert_zero_shot(again.eval(), pair, images(3), *texts)
    inputs, expected = (p(images=[picture(0)], text=["a red circle"]) for p in (its_processor, processor))
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@torch.no_grad()
def test_pairs_are_scored_over_its_tokens(pair):
    model, _ = build(pair)
    image_state, text_state = model.encode_images(images(2)), model.encode_texts(*ended_texts(9, 11))
    pairs = torch.tensor([[0, 8], [1, 2], [1, 0]])
    expected = plain_score(model, image_state.tokens, text_state, pairs)
    torch.testing.assert_close(model.score_pairs(image_state, text_state, pairs).logits, expected, atol=1e-5, rtol=1e-4)


def test_every_parameter_is_trained(pair):
    model, _ = build(pair)
    loss = "softmax" if model.dual.logit_bias is None else "sigmoid"
    actual = gradients(model.train(), step(model, itc_loss=loss).loss)
    assert {name for name, _ in model.named_parameters()} == set(actual)
    groups = parameter_groups(model, backbone_lr=1e-5, lr=1e-4, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(actual)
    scalars = (model.dual.logit_scale, model.dual.logit_bias)
    decaying = [id(p) for group in groups if group["weight_decay"] for p in group["params"]]
    assert not [p for p in scalars if id(p) in decaying]


def test_its_text_tower_alone(pair, tmp_path):
    """Beside any image tower, out of the whole checkpoint or a folder of its own; changes are to the text's config."""
    theirs(pair).text_model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(pair).save_pretrained(tmp_path)
    expected = theirs(pair).text_model.state_dict()
    for name in (pair, str(tmp_path)):
        options = with_text(name, None, FUSION, pooling="backbone", kwargs={"attention_dropout": 0.25})
        text = build_scenes(options)[0].dual.text
        assert {key: value.tolist() for key, value in text.model.state_dict().items()} == {
            key: value.tolist() for key, value in expected.items()
        }
        assert text.model.config.attention_dropout == 0.25 and text.model.config.pad_token_id == 0
    with pytest.raises(ValueError, match="'text_upper_layers' needs BERT-type layers; .*TextModel has none"):
        build_scenes(with_text(pair, 1))


def test_freezing_its_dual_head(pair):
    model, _ = build(pair, freeze=["vision", "text", "dual_head"])
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"fusion", "itm_head"}


def test_images_of_another_size(pair):
    model, processor = build(pair, image_size=48)
    pixels = processor(images=[picture(0)])["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    features = theirs(pair).get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    with torch.no_grad():  # The two interpolate a little differently.
        similarity = torch.cosine_similarity(model.get_image_features(pixels), features)
    assert similarity > 0.98


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"pair": f, "init": f}, "exclude each other; give only one"),
        (lambda f: {"pair": "./no-such-pair"}, "no model folder './no-such-pair' for the pair"),
        (lambda f: {"pair": "no/such-pair"}, "no/such-pair.*pip install"),
        (lambda f: {"pair": save_bert(Path(f, "bert"))}, "holds a 'bert' model, wanted 'clip' or 'siglip'"),
        (lambda f: {"pair": f, "fusion": FusionOptions(init="text_upper_layers")}, "needs BERT-type layers"),
        (lambda f: {"pair": f, "fusion": FusionOptions(style="shared")}, "needs BERT-type layers"),
        (lambda f: {"pair": f, "image_size": 36}, "36 is not a multiple of the patch size 8"),
    ],
)
def test_what_cannot_be_started_from_is_said_in_one_line(pair, monkeypatch, change, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        build_model(ModelOptions(**change(pair)))
    assert "\n" not in str(raised.value)


def test_a_pair_without_a_fixed_size_or_pooling_head_or_weights_is_refused(tmp_path):
    Siglip2Config(text_config=TEXT, vision_config={"hidden_size": 32}).save_pretrained(tmp_path / "naflex")
    with pytest.raises(ValueError, match="'siglip2' model, wanted .* fixed size, not NaFlex"):
        build(str(tmp_path / "naflex"))
    name = save_pair(tmp_path / "siglip", "siglip", {"vision_use_head": False})
    with pytest.raises(ValueError, match="has no pooling head"):
        build(name)
    name = save_pair(tmp_path / "clip", "clip")
    model = CLIPModel.from_pretrained(name)
    model.save_pretrained(name, state_dict={k: v for k, v in model.state_dict().items() if "post_layernorm" not in k})
    with pytest.raises(ValueError, match="missing weights .*post_layernorm"):
        build(name)


@pytest.fixture
def without_mask(pair, tmp_path) -> str:
    """The pair with a tokenizer that has no mask token, as CLIP's."""
    folder = Path(shutil.copytree(pair, tmp_path / Path(pair).name))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("[MASK]", "unheard").replace('"mask_token"', '"unused"'))
    return str(folder)


def test_word_prediction_gives_a_tokenizer_without_a_mask_token_one(without_mask, tmp_path):
    """The words that were there keep their ids and vectors, the captions their embeds."""
    plain, before = build(without_mask)
    model, processor = build(without_mask, mlm_head=True)
    assert before.tokenizer.mask_token_id is None
    mask, size = processor.tokenizer.mask_token_id, plain.dual.text.model.get_input_embeddings().weight.shape[0]
    words = model.dual.text.model.get_input_embeddings().weight
    assert len(words) == max(size, mask + 1) and before.tokenizer.convert_ids_to_tokens(mask) is None
    assert torch.equal(words[:size], plain.dual.text.model.get_input_embeddings().weight)
    texts = list(captions(0, 3))
    for name, value in before(text=texts).items():
        assert torch.equal(value, processor(text=texts)[name]), name
    ids, attention = ended_texts(9, 11)
    assert torch.equal(model.get_text_features(ids, attention), plain.get_text_features(ids, attention))
    masking = token_masking(processor.tokenizer)
    assert masking is not None and masking.mask_token_id == mask
    bias = plain.dual.logit_bias is not None
    batch = step_batch(longest=11)
    objective = build_objective(
        model.train(),
        ObjectiveOptions(mlm=1.0, itc_loss="sigmoid" if bias else "softmax", distillation=0.0),
        masking=masking,
    )
    output = objective(**batch)
    assert output.terms["mlm"].isfinite() and gradients(model, output.loss)["mlm_head.dense.weight"].any()
    model.eval().save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    saved = load_saved(tmp_path / "saved")
    assert saved.processor.tokenizer.mask_token_id == mask
    assert torch.equal(saved.model.get_text_features(ids, attention), model.get_text_features(ids, attention))
