"""A folder of a model that lacks a part, or whose parts do not fit each other, is refused in one line."""

import json
import shutil

import pytest
from helpers.tiny_building import save_tiny
from transformers import AutoProcessor, BertTokenizerFast

from loopitr import DualEncoder, LoopITRModel, LoopITRProcessor, load
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
