"""A folder of a model that lacks a part, or whose parts do not fit each other, is refused in one line."""

import json
import shutil

import pytest
import torch
from helpers.tiny_building import build, save_bert, save_tiny, with_text
from helpers.tiny_pairs import save_pair
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, BertTokenizerFast

from loopitr import DualEncoder, LoopITRModel, LoopITRProcessor, load
from loopitr.building.options import ModelOptions
from loopitr.building.towers import load_tower
from loopitr.models.processing import word_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_tiny(folder)
    dual = LoopITRModel.from_pretrained(folder).dual_encoder()
    dual.save_pretrained(folder.parent / "dual")
    LoopITRProcessor.from_pretrained(folder).save_pretrained(folder.parent / "dual")
    return folder.parent


@pytest.fixture(params=["model", "dual"])
def folder(saved, tmp_path, request):
    shutil.copytree(saved / request.param, tmp_path / "x")
    return tmp_path / "x"


def refused(folder, match, kind=(ValueError, OSError), by=load):
    with pytest.raises(kind, match=match) as raised:
        by(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def edit(path, part, **changes):
    content = json.loads(path.read_text())
    (content[part] if part else content).update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("tokenizer.json", "x has no vocabulary: tokenizer.json or vocab.txt is missing"),
        ("tokenizer_config.json", "x has no tokenizer: tokenizer_config.json is missing"),
        ("processor_config.json", "x has no image processor: processor_config.json or preprocessor_config.json"),
    ],
)
def test_a_missing_part_of_the_processor(folder, name, match):
    (folder / name).unlink()
    for by in (load, LoopITRProcessor.from_pretrained):
        refused(folder, match, OSError, by)
    with pytest.raises((OSError, ValueError)):
        AutoProcessor.from_pretrained(folder)
    (folder / name).write_text("[")
    refused(folder, f"{name} is damaged: it is not JSON")
    (folder / name).write_text("[]")
    refused(folder, f"{name} is damaged: it holds a list, wanted an object")


def test_a_tokenizer_of_special_tokens_alone_is_not_made_up(folder):
    """What transformers makes of a BERT tokenizer whose words are missing."""
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", None, tokenizer_class="BertTokenizer")
    refused(folder, "has no vocabulary")
    BertTokenizerFast(
        vocab={name: i for i, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    ).save_pretrained(folder)
    refused(folder, "knows no words: it has only 5 special tokens")


def test_a_tokenizer_that_cannot_pad(folder):
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["pad_token"]
    path.write_text(json.dumps(content))
    refused(folder, "no padding token")


def test_another_models_tokenizer(folder):
    word_tokenizer([f"word{i}" for i in range(100)], max_length=20).save_pretrained(folder)
    refused(folder, "the tokenizer has 105 tokens, the text backbone 60")


def test_a_tokenizer_of_far_fewer_words_than_the_model(folder, monkeypatch):
    monkeypatch.setattr("loopitr.building.sizes.SPARE_TOKENS", 10)  # the tiny model has 60 words in all
    refused(folder, "the tokenizer has 38 tokens, the text backbone 60")


def test_more_tokens_than_positions_and_none_said(folder):
    edit(folder / "tokenizer_config.json", None, model_max_length=500)
    refused(folder, "cuts texts to 500 tokens, the text backbone takes 24")
    edit(folder / "tokenizer_config.json", None, model_max_length=10**30)
    assert load(folder).processor(text=["a red circle " * 40])["input_ids"].shape == (1, 24)


def test_images_of_another_size(folder):
    square = {"height": 64, "width": 64}
    edit(folder / "processor_config.json", "image_processor", size=square, crop_size=square)
    refused(folder, "gives images of 64 x 64 pixels, the image backbone takes 32 x 32")


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("text", {"vocab_size": 30}, r"word_embeddings.weight is \[60, 32\], wanted \[30, 32\]"),
        ("text", {"max_position_embeddings": 12}, r"position_embeddings.weight is \[24, 32\], wanted \[12, 32\]"),
        ("vision", {"image_size": 64}, r"pos_embed is \[1, 17, 32\], wanted \[1, 65, 32\]"),
    ],
)
def test_a_config_of_other_sizes_than_the_weights(folder, part, change, named):
    edit(folder / "config.json", part, **change)
    refused(folder, f"config.json does not fit the weights: .*{named}", ValueError)


def test_missing_or_damaged_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")
    refused(folder, "weights are damaged")
    (folder / "model.safetensors").unlink()
    refused(folder, "no file named model.safetensors")


def test_what_is_whole_loads(saved):
    for name, kind in (("model", LoopITRModel), ("dual", DualEncoder)):
        assert type(load(saved / name).model) is kind


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("vision_projection.weight"))
    change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def weights_elsewhere(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def words(folder, change):
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))


def saved_as(kind, ending):
    """The weights whose names end so, saved in another type."""

    def harm(folder):
        weights = load_file(folder / "model.safetensors")
        for name in [name for name in weights if name.endswith(ending)]:
            weights[name] = (20 * weights[name]).to(kind)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return harm


def same_id(folder):
    def change(words):
        words["red"] = words["blue"]

    words(folder, change)


def tokenizer(**changes):
    return lambda folder: edit(folder / "tokenizer_config.json", None, **changes)


def images(**changes):
    return lambda folder: edit(folder / "processor_config.json", "image_processor", **changes)


def config(part=None, **changes):
    return lambda folder: edit(folder / "config.json", part, **changes)


OTHERS = {
    "weights of NaN": (
        lambda folder: change_weights(folder, lambda tensor: tensor[0, 0].fill_(torch.nan)),
        "its weights are damaged: .*vision_projection.weight is not finite",
    ),
    "weights elsewhere": (weights_elsewhere, "names '../outside.safetensors', which is no file in that folder"),
    "weights in eight bits": (
        saved_as(torch.int8, "_projection.weight"),
        "projection.weight is saved as I8, wanted one of F64, F32, F16, BF16",
    ),
    "a weight of yes and no": (saved_as(torch.bool, "vision_projection.weight"), "is saved as BOOL"),
    "weights of 8 bits with a point": (saved_as(torch.float8_e4m3fn, "weight"), "is saved as F8_E4M3"),
    "complex weights": (saved_as(torch.complex64, "logit_scale"), "logit_scale is saved as C64"),
    "two words of one id": (same_id, "gives '(red|blue)' and '(red|blue)' the same id"),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}'),
        "holds an adapter of peft",
    ),
    "a quantised config": (config(quantization_config={"quant_method": "fp8"}), "asks for a quantisation"),
    "a checkpoint to read": (config("vision", kwargs={"checkpoint_path": "/etc/passwd"}), "'checkpoint_path' does not"),
    "layers without end": (config("text", num_hidden_layers=10**9), "num_hidden_layers .* is too large"),
    "a width without end": (config(embed_dim=10**12), "embed_dim .* is too large"),
    "a deep config": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        "config.json is damaged: .*nested too deeply",
    ),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged: it holds a list"),
    "parts of other types": (config(text=["bert"]), "text must be a mapping"),
    "a token beyond the vocabulary": (lambda folder: words(folder, lambda words: words.update(red=5000)), "token 5000"),
    "a negative length": (tokenizer(model_max_length=-5), "model_max_length -5, wanted at least 3"),
    "no room for a word": (tokenizer(model_max_length=2), "model_max_length 2, wanted at least 3"),
    "a length in words": (tokenizer(model_max_length="24"), "model_max_length '24'"),
    "pixels divided by zero": (images(image_std=[0, 0, 0]), "pixels that are not finite"),
    "an unknown resampling": (images(resample=99), "the image processor of .* cannot be loaded: KeyError 99"),
    "huge images": (images(size={"shortest_edge": 10**9}), "resizes images to 1000000000 pixels"),
}


@pytest.mark.parametrize(("harm", "match"), OTHERS.values(), ids=OTHERS.keys())
def test_what_would_be_another_model_or_none(folder, harm, match):
    harm(folder)
    refused(folder, match)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_is_checked_on_its_own_side(folder, tower):
    harms = {
        "image": [
            saved_as(torch.int8, "vision_projection.weight"),
            images(image_std=[0, 0, 0]),
            lambda f: change_weights(f, lambda tensor: tensor.fill_(torch.nan)),
        ],
        "text": [lambda f: words(f, lambda words: words.update(red=5000))],
    }
    for number, (side, harm) in enumerate((side, harm) for side, all_harms in harms.items() for harm in all_harms):
        shutil.copytree(folder, folder.parent / str(number))
        harm(folder.parent / str(number))
        if side == tower:
            refused(
                folder.parent / str(number),
                "not finite|token 5000|saved as I8",
                by=lambda path: load_tower(path, tower),
            )
        else:
            load_tower(folder.parent / str(number), tower)


def test_a_text_backbone_or_a_pair_in_eight_bits(tmp_path):
    bert, clip = save_bert(tmp_path / "bert"), save_pair(tmp_path / "clip", "clip")
    saved_as(torch.int8, "attention.self.query.weight")(tmp_path / "bert")
    saved_as(torch.uint8, "text_projection.weight")(tmp_path / "clip")
    for options, kind in ((with_text(bert, 2), "I8"), (ModelOptions(pair=clip), "U8")):
        with pytest.raises(ValueError, match=f"weight is saved as {kind}, wanted one of F64") as raised:
            build(options)
        assert "\n" not in str(raised.value)
