"""A SentenceTransformer of stock modules gives the model's own vectors, without this package."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.utils import compare_versions
from helpers.recipe_process import environment
from helpers.support import BERT, CNN, SIZES, VIT, tiny_model
from helpers.tiny_gallery import captions, picture, tiny_processor
from PIL import ExifTags, Image, ImageOps
from sentence_transformers import SentenceTransformer

import loopitr.export.sentence_transformers as exporting
from loopitr import Retriever, export_sentence_transformers

TEXTS = [*captions(1, 5), "no known word in here but red", " ".join(["blue"] * 60)]
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "image_size": 64,
    "kwargs": {"window_size": 4, "embed_dim": 24, "depths": [1, 1, 1, 1]},
}


ON_WHITE = compare_versions("transformers", ">=", "5.21")  # An older version drops transparency.


def pictures():
    """Every 8-bit mode of Pillow, with and without transparency, of several sizes."""
    modes = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LA", "RGBA")
    made = [picture(index, (50 + index, 40)).convert(mode) for index, mode in enumerate(modes)]
    clear = picture(20).convert("RGBA")
    clear.putalpha(picture(21).convert("L"))
    palette = picture(22).convert("P")
    palette.info["transparency"] = 3
    return [*made, clear, clear.convert("LA"), palette] if ON_WHITE else made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision_pooling": "first", "text_pooling": "first", "projection": "linear"},
        {"vision_pooling": "mean", "text_pooling": "backbone"},
        {"vision": CNN, "projection": "mlp", "projection_dropout": 0.1},
        {"vision": CNN, "vision_pooling": "mean", "style": "shared"},
        {"vision": SWIN, "vision_pooling": "mean"},
        {"text": {"model_type": "distilbert", "vocab_size": 60, "dim": 32, "n_layers": 1, "n_heads": 4}},
        {"text": {"model_type": "clip_text_model", **SIZES, "eos_token_id": 3}, "text_pooling": "backbone"},
    ],
    ids=["vit", "first", "mean", "cnn mlp", "cnn mean", "swin", "distilbert", "clip"],
)
def test_vectors_are_the_models_own(tmp_path, changes):
    model = tiny_model(**changes)
    processor = tiny_processor(model.config.vision["image_size"])
    exported = export_sentence_transformers(model, tmp_path / "out", processor=processor)
    assert {*exported.parity} == {"text", "image"} and max(exported.parity.values()) <= 1e-5
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    own = Retriever(model, processor)
    with pytest.warns(UserWarning, match="1 of 7 texts were cut"):
        expected = own.encode_texts(TEXTS)
    np.testing.assert_allclose(loaded.encode(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(loaded.encode(pictures()), own.encode_images(pictures()), atol=1e-5)
    assert loaded.get_embedding_dimension() == 16 and loaded.max_seq_length == 24


@pytest.mark.slow
def test_it_loads_without_this_package_and_without_notes(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    export_sentence_transformers(tmp_path / "run", tmp_path / "out")
    code = """
import sys
sys.modules["loopitr"] = None
import numpy as np
from PIL import ExifTags, Image, ImageOps
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=False)
query, images = model.encode_query(["a red circle"]), model.encode([Image.new("RGB", (40, 30), "red")])
print(model.similarity(query, images).item())
"""
    words = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr and "MISSING" not in done.stderr
    own = Retriever(model, processor)
    expected = own.similarity(
        own.encode_texts(["a red circle"]), own.encode_images([Image.new("RGB", (40, 30), "red")])
    )
    assert float(done.stdout) == pytest.approx(float(expected), abs=1e-5)
    for file in (tmp_path / "out").rglob("*.json"):
        assert "auto_map" not in json.loads(file.read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\n") and "{" not in card


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower(tmp_path, tower):
    model, processor = tiny_model(projection="mlp", projection_dropout=0.1), tiny_processor()
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    exported = export_sentence_transformers(tmp_path / "run", tmp_path / "out", tower=tower)
    assert [*exported.parity] == [tower]
    loaded, own = SentenceTransformer(str(tmp_path / "out"), device="cpu"), Retriever(model, processor)
    given = pictures() if tower == "image" else TEXTS[:-1]
    expected = own.encode_images(given) if tower == "image" else own.encode_texts(given)
    np.testing.assert_allclose(loaded.encode(given), expected, atol=1e-5)
    assert loaded.modalities == [tower]


def test_what_stock_modules_do_not_cover_is_named(tmp_path, monkeypatch):
    siglip = tiny_model(text={"model_type": "siglip_text_model", **SIZES}, text_pooling="backbone")
    with pytest.raises(ValueError, match="the text backbone 'siglip_text_model' cannot be a SentenceTransformer"):
        export_sentence_transformers(siglip, tmp_path / "out", processor=tiny_processor())
    # A ViT whose layer norms have an epsilon that JSON cannot hold: found by comparing the vectors.
    vision = {**VIT, "kwargs": {**VIT["kwargs"], "norm_eps": 0.1}}
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224' cannot be .*: stock modules give vectors that differ"):
        export_sentence_transformers(tiny_model(vision), tmp_path / "out", processor=tiny_processor())
    assert not [*tmp_path.iterdir()]


def test_bad_input_is_named(tmp_path, monkeypatch):
    model, given = tiny_model(text={**BERT, "num_hidden_layers": 1}), {"processor": tiny_processor()}
    with pytest.raises(ValueError, match="tower must be one of image, text, got 'audio'"):
        export_sentence_transformers(model, tmp_path / "out", tower="audio", **given)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    with pytest.raises(ValueError, match="full exists and is not empty"):
        export_sentence_transformers(model, tmp_path / "full", **given)
    with pytest.raises(OSError, match="no model folder"):
        export_sentence_transformers(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="needs its processor"):
        export_sentence_transformers(model, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "loopitr\[sentence-transformers\]"'):
            export_sentence_transformers(model, tmp_path / "out", **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_the_callers_model_stays_as_it_is(tmp_path):
    model = tiny_model(text={**BERT, "num_hidden_layers": 1}).to(torch.bfloat16)
    limit = (processor := tiny_processor()).tokenizer.model_max_length
    exporting.export_sentence_transformers(model, tmp_path / "out", processor=processor)
    assert model.dtype == torch.bfloat16 and processor.tokenizer.model_max_length == limit


def test_the_cards_lines_convert_the_images_that_differ(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    export_sentence_transformers(model, tmp_path / "out", processor=processor)
    loaded, own = SentenceTransformer(str(tmp_path / "out"), device="cpu"), Retriever(model, processor)
    lines = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("image = ")]
    grey = np.asarray(picture(3).convert("L"))
    rotated = picture(5, (40, 30))
    rotated.getexif()[ExifTags.Base.Orientation] = 6
    clear = picture(20).convert("RGBA")
    clear.putalpha(picture(21).convert("L"))
    deep = [Image.fromarray(grey.astype(np.uint16) * 250), Image.fromarray(grey.astype(np.float32) / 255)]
    images = [rotated, *deep, clear]
    assert [image.mode for image in images] == ["RGB", "I;16", "F", "RGBA"] and len(lines) == 4
    for image, line in zip(images, lines):
        wanted = own.encode_images([image])
        names = {"np": np, "Image": Image, "ImageOps": ImageOps, "image": image}
        exec(line, names)
        same = ON_WHITE and image is clear
        assert (np.abs(loaded.encode([image]) - wanted).max() <= 1e-5) == same, line
        assert np.abs(loaded.encode([names["image"]]) - wanted).max() <= 1e-5, line


def test_an_image_with_transparency_is_not_passed_as_a_path(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    export_sentence_transformers(model, tmp_path / "out", processor=processor)
    loaded, own = SentenceTransformer(str(tmp_path / "out"), device="cpu"), Retriever(model, processor)
    clear, path = picture(20).convert("RGBA"), str(tmp_path / "clear.png")
    clear.putalpha(picture(21).convert("L"))
    clear.save(path)
    wanted = own.encode_images([path])
    assert np.abs(loaded.encode([path]) - wanted).max() > 1e-3
    assert (np.abs(loaded.encode([Image.open(path)]) - wanted).max() <= 1e-5) == ON_WHITE
