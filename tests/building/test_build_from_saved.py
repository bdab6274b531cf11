"""Models out of saved ones, the key of their cached tokens, and what is said when a model cannot be built."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_building import DEPTH, build, save_bert, save_text, save_tiny, scratch, with_text, with_vit
from helpers.tiny_gallery import picture, tiny_processor
from safetensors.torch import load_file
from transformers import DistilBertConfig, DistilBertModel

from loopitr import DualEncoder, LoopITRModel
from loopitr.building.build import build_model
from loopitr.building.keys import text_cache_key, token_cache_key
from loopitr.building.options import FusionOptions, ModelOptions, TextOptions, VisionOptions


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def folders(saved, tmp_path_factory):
    """`.bert`, `.distilbert`: text backbones; `.saved`: a model; `.dual`: its dual encoder alone."""
    bert, distilbert, dual = (tmp_path_factory.mktemp(name) for name in ("bert", "distilbert", "dual"))
    save_bert(bert)
    config = DistilBertConfig(vocab_size=60, n_layers=2, n_heads=4, dim=32, hidden_dim=48, max_position_embeddings=40)
    save_text(distilbert, DistilBertModel(config))
    encoder = LoopITRModel.from_pretrained(saved).dual_encoder()
    assert isinstance(encoder, DualEncoder)
    encoder.save_pretrained(dual)
    tiny_processor().save_pretrained(dual)
    return SimpleNamespace(bert=str(bert), distilbert=str(distilbert), dual=str(dual), saved=saved)


# From a saved model


def test_init_is_the_saved_model(saved):
    model, processor = build_model(ModelOptions(init=saved))
    expected = load_file(f"{saved}/model.safetensors")
    own = model.state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert processor(images=picture(0))["pixel_values"].shape == (1, 3, 32, 32)


def test_a_saved_model_without_token_agreement_stays_without(saved):
    """A converted ALBEF or BLIP model, say: it scores as it did."""
    with pytest.warns(UserWarning, match=r"has no token agreement: model.fusion.agreement is left off"):
        model, _ = build_model(ModelOptions(init=saved, fusion=FusionOptions(agreement=True)))
    assert model.agreement is None


def test_init_with_token_agreement_keeps_it(tmp_path):
    for part in build(scratch(fusion=FusionOptions(num_layers=1, num_heads=4, intermediate_size=48, agreement=12))):
        part.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = build_model(ModelOptions(init=str(tmp_path), fusion=FusionOptions(agreement=True)))
    assert model.agreement is not None and model.config.fusion["agreement"] == 12


@pytest.mark.parametrize("given, width", [(False, None), (True, 256), (12, 12), (1, 1)])
def test_the_width_of_token_agreement(given, width):
    model, _ = build(scratch(fusion=FusionOptions(num_layers=1, num_heads=4, agreement=given)))
    assert model.config.fusion["agreement"] == width
    assert (None if model.agreement is None else model.agreement.word.out_features) == width


@pytest.mark.parametrize("given", [0, -3])
def test_a_width_of_nothing_is_refused(given):
    with pytest.raises(ValueError, match=f"model.fusion.agreement must be true, false or a width, .* got {given}"):
        FusionOptions(agreement=given)


def test_init_with_another_image_size(saved, tmp_path):
    model, processor = build_model(ModelOptions(init=saved, image_size=48, freeze=["vision"]))
    old = load_file(f"{saved}/model.safetensors")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    assert changed == {"dual.vision.model.pos_embed"}
    pixels = processor(images=picture(0))["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    assert not model.dual.vision.model.pos_embed.requires_grad  # The parameter is new and frozen all the same.
    model.eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = build_model(ModelOptions(init=str(tmp_path)))
    assert torch.equal(again.eval().get_image_features(pixels), model.get_image_features(pixels))
    assert its_processor(images=picture(0))["pixel_values"].shape == (1, 3, 48, 48)


def test_init_with_a_cnn_of_another_image_size_resizes_the_fusion_positions(tmp_path):
    model, processor = build(scratch())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    resized, _ = build_model(ModelOptions(init=str(tmp_path), image_size=96))
    state = resized.eval().encode_images(torch.zeros(1, 3, 96, 96))
    assert resized.fusion.image_positions.shape == (1, 9, 16)
    texts = resized.encode_texts(torch.tensor([[2, 7, 3]]))
    assert resized.score_pairs(state, texts, torch.zeros(1, 2, dtype=torch.int64)).score.isfinite().all()


def test_freezing_stops_exactly_the_named_parts():
    model, _ = build(scratch(freeze=["vision", "fusion"]))
    trained = {name.split(".")[0] + "." + name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"dual.text", "dual.text_projection", "dual.vision_projection", "dual.logit_scale"}
    model.train()
    assert not model.dual.vision.training and not model.fusion.training and model.dual.text.training


# The key of cached tokens


def key_after(compute, saved, change=None, **options):
    model, processor = build_model(ModelOptions(init=saved, **options))
    with torch.no_grad():
        if change is not None:
            change(model, processor)
    return compute(model, processor)


def test_cache_key_follows_the_image_backbone_and_the_transform_only(saved):
    key = partial(key_after, token_cache_key, saved)
    first = key()
    assert key() == first
    assert key(lambda m, p: next(m.dual.text.parameters()).add_(1)) == first
    assert key(lambda m, p: m.dual.vision_projection.weight.add_(1)) == first
    others = {
        key(lambda m, p: m.dual.vision.model.norm.bias[-1:].add_(1e-6)),
        key(lambda m, p: setattr(p.image_processor, "image_mean", [0.4, 0.5, 0.5])),
        key(lambda m, p: setattr(p.image_processor, "do_normalize", False)),
        key(image_size=48),
    }
    assert first not in others and len(others) == 4


@pytest.mark.slow
def test_text_cache_key_follows_the_text_backbone_where_fusion_starts_and_the_tokenizer_only(saved):
    key = partial(key_after, text_cache_key, saved)
    first = key()
    assert key() == first
    assert key(lambda m, p: next(m.dual.vision.parameters()).add_(1)) == first
    assert key(lambda m, p: m.dual.text_projection.weight.add_(1)) == first
    assert key(lambda m, p: p.tokenizer("a", truncation=True, max_length=3, padding=True)) == first  # it remembers this
    others = {
        key(lambda m, p: next(m.dual.text.parameters())[-1:].add_(1e-3)),
        key(lambda m, p: setattr(p.tokenizer, "model_max_length", 5)),
        key(lambda m, p: p.tokenizer.add_tokens(["squircle"])),
        key(lambda m, p: setattr(p.tokenizer, "truncation_side", "left")),
        key(lambda m, p: setattr(p.tokenizer, "padding_side", "left")),
        key(lambda m, p: setattr(m.config, "text_pooling", "first")),
        key(lambda m, p: m.config.fusion.update(style="shared")),
        key(lambda m, p: m.config.fusion.update(style="shared", num_layers=9)),
    }
    assert first not in others and len(others) == 8
    # Layers on top of the text backbone do not change its tokens.
    assert key(lambda m, p: m.config.fusion.update(num_layers=9)) == first


def test_cache_key_survives_saving(tmp_path):
    """A resumed or fine-tuned run must find the tokens of the run before it."""
    model, processor = build(scratch())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = build_model(ModelOptions(init=str(tmp_path)))
    assert token_cache_key(*again) == token_cache_key(model, processor)
    assert text_cache_key(*again) == text_cache_key(model, processor)


# What cannot be built


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda f: with_text(f.bert, DEPTH + 1), rf"num_layers is {DEPTH + 1}, but .* has {DEPTH} layers"),
        (lambda f: with_text(f.bert, 0), "num_layers is 0"),
        (lambda f: with_text(f.bert, 2, FusionOptions(style="shared", init="text_upper_layers")), "style 'late'"),
        (lambda f: with_text(f.bert, 2, FusionOptions(num_layers=5, init="text_upper_layers")), "text_upper_layers"),
        (lambda f: with_text(f.bert, 2, pretrained=False), "pretrained text"),
        (lambda f: with_text(f.bert, 2, pooling="backbone"), "missing .*pooler.dense"),
        (lambda f: with_text(f.distilbert, 1), "BERT-type layers; DistilBertModel"),
        (lambda f: with_text(f.bert, 2, kwargs={"hiden_size": 3}), "bert config has no 'hiden_size'"),
        (lambda f: with_text(f.bert, 2, kwargs={"intermediate_size": 96}), "is .48, 32., wanted .96, 32."),
        (lambda f: with_text("no/such-model"), "no/such-model.*pip install"),
        (lambda f: with_text("./no-such-folder"), "no-such-folder"),
        (lambda f: scratch(text=TextOptions(name="scenes")), "pretrained false"),
        (lambda f: scratch(vision=VisionOptions(name="resnet10tt", pretrained=False)), "no model .resnet10tt."),
        (lambda f: scratch(vision=VisionOptions(name="resnet26t")), "no weights for 'resnet26t'.*pip install"),
        (lambda f: scratch(vision=VisionOptions(name="cspresnet50d")), "no pretrained weights for cspresnet50d"),
        (lambda f: scratch(vision=VisionOptions(name="resnet10t", pretrained=False, kwargs={"bogus": 1})), "bogus"),
        (lambda f: with_vit(36, pretrained=False), "36 is not a multiple of the patch size 8"),
        (lambda f: with_vit(32, checkpoint="absent.safetensors"), "absent.safetensors"),
        (lambda f: scratch(freeze=["head"]), "cannot freeze 'head'"),
        (lambda f: ModelOptions(init="no-such-run"), "no-such-run"),
        (lambda f: ModelOptions(init="no/such-run"), "no/such-run"),
        (lambda f: ModelOptions(init=f.bert), "'bert' model"),
        (lambda f: ModelOptions(init=f.dual), "dual encoder alone"),
        (lambda f: ModelOptions(init=f.saved, image_size=36), "36 is not a multiple of the patch size 8"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(folders, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        build(options(folders))
    assert "\n" not in str(raised.value)
