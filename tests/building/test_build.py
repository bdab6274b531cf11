"""Models out of options: which pretrained weights end up where."""

import pytest
import timm
import torch
from helpers.support import VIT
from helpers.tiny_building import CNN, DEPTH, SMALL, build, save_bert, save_text, scratch, with_text, with_vit
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from transformers import RobertaConfig, RobertaModel

from loopitr.building.options import FusionOptions, ModelOptions, TextOptions, VisionOptions
from loopitr.data import SceneRecords
from loopitr.objective.word_masking import token_masking

SAME_PART = {  # The keys are names in a fusion layer, the values those in a BERT layer.
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward_in": "intermediate.dense",
    "feed_forward_out": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A timm checkpoint at 32 pixels, classifier included."""
    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model(VIT["name"], img_size=32, num_classes=7, **VIT["kwargs"]).state_dict(), file)
    return str(file)


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
    assert model.dual.logit_bias is None


def test_the_size_for_a_saved_model_is_refused_for_a_new_one():
    with pytest.raises(ValueError, match=r"model.image_size 288 is the size .* a new model .* model.vision.image_size"):
        ModelOptions(image_size=288)


def test_the_dual_head_of_the_sigmoid_loss():
    model, _ = build(scratch(temperature=0.1, logit_bias=-10))
    assert 1 / model.dual.scale.item() == pytest.approx(0.1) and model.dual.logit_bias.item() == -10
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([[2, 7, 3]])
    output = model.eval()(pixels, ids)
    torch.testing.assert_close(output.logits_per_image, 10 * output.image_embeds @ output.text_embeds.T - 10)


def test_captions_are_cut_to_what_the_text_backbone_takes():
    kwargs = {"num_hidden_layers": 1, **SMALL, "max_position_embeddings": 12}
    text = TextOptions(name="scenes", pretrained=False, max_length=64, kwargs=kwargs)
    model, processor = build(scratch(text=text))
    inputs = processor(text=["red " * 50])
    assert inputs["input_ids"].shape == (1, 12)
    model.get_text_features(**inputs)


def test_masking_knows_the_special_tokens():
    _, processor = build(scratch())
    masking = token_masking(processor.tokenizer)
    tokenizer = processor.tokenizer
    assert masking.mask_token_id == tokenizer.convert_tokens_to_ids("[MASK]")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert set(masking.special_ids) == set(tokenizer.convert_tokens_to_ids(special))
    tokenizer.mask_token = None
    assert token_masking(processor.tokenizer) is None


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
    copied = [
        torch.equal(model.fusion.text[0].query.weight, source[f"encoder.layer.{i}.attention.self.query.weight"])
        for i in range(DEPTH)
    ]
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 2}, "max_length of 2 leaves no place for a word: the tokenizer itself adds 2"),
        ({"kwargs": {"vocab_size": 9}}, "'scenes' has the vocabulary of the built-in data, so no vocab_size"),
    ],
)
def test_texts_without_words_are_refused(change, message):
    text = TextOptions(**{"name": "scenes", "pretrained": False, **change})
    with pytest.raises(ValueError, match=message):
        build(scratch(text=text))


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
    assert torch.equal(own["pos_embed"][:, 0], expected["pos_embed"][:, 0])  # This is the class token's position.
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
