"""Training, evaluation and a saved folder see the same picture and the same words: their embeds are the same."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from helpers.tiny_building import build, save_bert, with_text
from helpers.tiny_gallery import picture
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, AutoTokenizer

from loopitr import load
from loopitr.building.options import FusionOptions
from loopitr.data import Collator, decode_image, scene_vocabulary
from loopitr.evaluation import evaluation_transform

LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`saved/`, built on a text encoder whose tokenizer was saved to cut at 128 tokens, as all-MiniLM-L6-v2's was."""
    folder = tmp_path_factory.mktemp("preprocessing")
    text = save_bert(folder / "text")
    path = folder / "text" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    path = folder / "text" / "tokenizer_config.json"
    given = {"max_length": 128, "stride": 0, "truncation_strategy": "longest_first"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **given}))
    model, processor = build(with_text(text, fusion=FusionOptions(num_layers=1, num_heads=4), max_length=LENGTH))
    built = processor(text=[LONG])["input_ids"]
    assert built.shape == (1, LENGTH)
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    return folder


LONG = " ".join(scene_vocabulary() * 3)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b).min().detach())


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_long_captions_have_the_embeds_of_training(folder):
    model, processor = load(folder / "saved")
    captions = [LONG, "a red circle"]
    examples = [
        {"caption": caption, "identity": 0, "skipped": [], "pixel_values": torch.zeros(3)} for caption in captions
    ]
    trained_on = Collator(processor.tokenizer, max_length=processor.tokenizer.model_max_length)(examples).inputs
    expected = model.get_text_features(trained_on["input_ids"], trained_on["attention_mask"])
    for each in (processor, AutoProcessor.from_pretrained(folder / "saved")):
        found = each(text=captions)
        assert torch.equal(found["input_ids"], trained_on["input_ids"]) and found["input_ids"].shape == (2, LENGTH)
        assert cosine(model.get_text_features(**found), expected) > 1 - 1e-6
    assert each(text=[LONG], max_length=9)["input_ids"].shape == (1, 9)  # whoever asks for it gets another length
    plain = AutoTokenizer.from_pretrained(folder / "saved")(captions, truncation=True, padding=True)["input_ids"]
    assert plain == trained_on["input_ids"].tolist()
    ids = Tokenizer.from_file(str(folder / "saved" / "tokenizer.json")).encode(LONG).ids  # of other libraries
    assert ids == plain[0]


def test_a_folder_saved_after_an_evaluation_cuts_at_the_same_length(folder, tmp_path):
    """What a tokenizer was last asked for stays in its backend, and would be saved."""
    _, processor = load(folder / "saved")
    processor.tokenizer([LONG], truncation=False)
    processor.save_pretrained(tmp_path)
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(LONG).ids) == LENGTH


@pytest.mark.parametrize("kind", ["EXIF", "16 bit", "CMYK", "palette", "palette with alpha", "alpha", "grey", "float"])
def test_every_kind_of_picture_has_the_embeds_of_training(folder, kind):
    image, values = picture(3, (48, 30)), np.linspace(0, 1, 48 * 30, dtype=np.float32).reshape(30, 48)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    transparent = image.copy()
    transparent.putalpha(Image.fromarray((values * 255).astype(np.uint8)))
    data = {
        "EXIF": lambda: encoded(image, "JPEG", exif=rotated),
        "16 bit": lambda: encoded(Image.fromarray((values * 65535).astype(np.uint16)), "PNG"),
        "CMYK": lambda: encoded(image.convert("CMYK"), "JPEG"),
        "palette": lambda: encoded(image.quantize(16), "PNG"),
        "palette with alpha": lambda: encoded(image.quantize(16), "PNG", transparency=3),
        "alpha": lambda: encoded(transparent, "PNG"),
        "grey": lambda: encoded(image.convert("L"), "JPEG"),
        "float": lambda: encoded(Image.fromarray(values), "TIFF"),
    }[kind]()
    model, processor = load(folder / "saved")
    pixels = evaluation_transform(processor)(decode_image(data))[None]
    expected = model.get_image_features(pixels)
    for each in (processor, AutoProcessor.from_pretrained(folder / "saved")):
        for images in (Image.open(io.BytesIO(data)), [Image.open(io.BytesIO(data))]):
            found = each(images=images)
            assert torch.equal(found["pixel_values"], pixels)
            assert cosine(model.get_image_features(**found), expected) > 1 - 1e-6
    if kind in ("EXIF", "16 bit", "float"):  # what transformers alone would make of it is another picture
        stock = processor.image_processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"]
        assert (stock - pixels).abs().mean() > 0.1
