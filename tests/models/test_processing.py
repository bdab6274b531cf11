"""The processor: stock parts, saved and loaded; pictures of every mode; the closed-vocabulary tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from loopitr import DualEncoderConfig, LoopITRProcessor
from loopitr.data.images import decode_image
from loopitr.models.processing import image_processor, word_tokenizer

WORDS = ["a", "red", "circle", "left", "of", "blue", "square"]
MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)


def processor(size: int = 8, max_length: int = 12) -> LoopITRProcessor:
    images = image_processor(size, mean=MEAN, std=STD, interpolation="bilinear")
    return LoopITRProcessor(image_processor=images, tokenizer=word_tokenizer(WORDS, max_length=max_length))


def picture(width: int = 20, height: int = 12) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_texts_are_padded_on_the_right_whatever_side_the_tokenizer_has():
    right, left = processor(), processor()
    left.tokenizer.padding_side = "left"
    captions = ["a red circle", "a circle left of a square"]
    assert torch.equal(left(text=captions)["attention_mask"], right(text=captions)["attention_mask"])
    assert left(text=captions, padding_side="left")["attention_mask"][0, 0] == 0


@pytest.mark.parametrize("as_dual", [False, True])
def test_auto_processor_round_trip(tmp_path, as_dual):
    saved = processor()
    saved.save_pretrained(tmp_path)
    if as_dual:  # It stands beside a model's config, as in a run folder.
        DualEncoderConfig().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LoopITRProcessor
    captions = ["a red circle", "a blue square left of a red purple circle"]
    ours, theirs = (p(images=[picture(), picture(9, 30)], text=captions) for p in (saved, loaded))
    assert set(ours) == set(theirs) == {"pixel_values", "input_ids", "attention_mask"}
    for key in ours:
        assert torch.equal(ours[key], theirs[key])
    assert loaded.tokenizer.model_max_length == 12 and loaded.tokenizer.mask_token_id == 4


def test_the_whole_picture_becomes_a_normalised_square():
    size = 8
    left_green = Image.new("RGB", (64, 32))
    left_green.paste((0, 255, 0), (0, 0, 32, 32))
    values = processor(size)(images=left_green)["pixel_values"]
    assert values.shape == (1, 3, size, size) and values.dtype == torch.float32
    restored = values[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    # No crop: the border between the halves stays in the middle, and both outer columns are pure.
    green = torch.tensor([0.0, 1.0, 0.0])[:, None].expand(3, size)
    torch.testing.assert_close(restored[:, :, 0], green, atol=0.02, rtol=0)
    torch.testing.assert_close(restored[:, :, -1], torch.zeros(3, size), atol=0.02, rtol=0)
    assert restored[1, 0, 3] > 0.5 > restored[1, 0, 4]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F"])
def test_pictures_of_every_mode_pass(mode):
    if mode == "I;16":
        image = Image.fromarray((np.arange(240, dtype=np.uint16) * 257).reshape(12, 20))
    elif mode == "F":
        image = Image.fromarray(np.linspace(0, 255, 240, dtype=np.float32).reshape(12, 20))
    else:
        image = picture().convert(mode)
    assert image.mode == mode
    values = processor()(images=[decode_image(image)])["pixel_values"]
    assert values.shape == (1, 3, 8, 8) and torch.isfinite(values).all()
    if mode in ("RGB", "CMYK"):
        assert (values - processor()(images=picture())["pixel_values"]).abs().max() < 0.05
    if mode in ("L", "LA", "I;16", "F"):  # Grey has the same value in each channel once the normalisation is undone.
        restored = values[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        torch.testing.assert_close(restored[0], restored[2], atol=1e-5, rtol=0)
        assert restored.std() > 0.01


def test_unknown_interpolation_is_named():
    with pytest.raises(ValueError, match="unknown interpolation 'cubic'"):
        image_processor(8, mean=MEAN, std=STD, interpolation="cubic")


def test_words_and_special_tokens():
    tokenizer = word_tokenizer(WORDS, max_length=12)
    encoded = tokenizer("A Red circle, purple!", return_token_type_ids=False)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == [
        *("[CLS]", "a", "red", "circle", "[UNK]", "[UNK]", "[UNK]", "[SEP]")
    ]
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (0, 2, 3)
    assert len(tokenizer) == len(WORDS) + 5
    assert tokenizer.decode(tokenizer("a red circle")["input_ids"], skip_special_tokens=True) == "a red circle"


def test_a_word_given_twice_leaves_no_hole_in_the_vocabulary():
    tokenizer = word_tokenizer(["a", "b", "a", "c", "b"], max_length=8)
    assert sorted(tokenizer.get_vocab().values()) == list(range(8))


def test_captions_are_padded_and_cut():
    batch = processor(max_length=6)(text=["a red", "a red circle left of a blue square"])
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["input_ids"][1, -1] == 3  # The end token survives the cut.
    whole = processor(max_length=6)(text=["a red circle left of a blue square"], truncation=False)
    assert whole["input_ids"].shape == (1, 10)


def test_pixels_below_0_are_refused_unless_they_are_not_rescaled():
    normalised = np.linspace(-1, 1, 3 * 8 * 8, dtype=np.float32).reshape(3, 8, 8)
    for image in (normalised, torch.from_numpy(normalised), Image.fromarray(normalised[0]).resize((9, 9))):
        with pytest.raises(ValueError, match="^image 1: pixel values from -1 to"):
            processor()(images=[picture(), image])
    prepared = processor()(images=[normalised], do_rescale=False, do_normalize=False, do_resize=False)["pixel_values"]
    torch.testing.assert_close(prepared[0], torch.from_numpy(normalised))
