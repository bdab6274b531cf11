"""The published setups in `recipes/configs`: each, with a toy in the place of its weights and data, trains one step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from fixtures.albef_tiny.plain import TEXT_HEADS, VISION_HEADS
from helpers.tiny_building import save_bert
from helpers.tiny_gallery import captions, jpeg
from helpers.tiny_pairs import save_pair
from helpers.tiny_run import make_trainer, reset_accelerate, without_curves
from transformers import BlipConfig, BlipForImageTextRetrieval

from loopitr import LoopITRModel
from loopitr.cli import parse
from loopitr.convert.__main__ import main as convert
from loopitr.data import scene_vocabulary
from loopitr.models.processing import word_tokenizer
from loopitr.training.options import PretrainOptions

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"
ALBEF_WEIGHTS = Path(__file__).resolve().parents[1] / "fixtures" / "albef_tiny" / "weights.safetensors"
IMAGES = 16


def albef(folder: Path) -> dict[str, object]:
    heads = ["--vision-heads", str(VISION_HEADS), "--text-heads", str(TEXT_HEADS)]
    convert(["albef", str(ALBEF_WEIGHTS), str(folder / "albef"), *heads, "--tokenizer", _words(folder)])
    return {"model.init": folder / "albef", "model.image_size": 32}  # The model was trained at size 24.


def blip(folder: Path) -> dict[str, object]:
    width = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    vision = {**width, "hidden_size": 32, "image_size": 32, "patch_size": 8}
    text = {**width, "hidden_size": 24, "vocab_size": 60, "max_position_embeddings": 40}
    config = BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=16)
    BlipForImageTextRetrieval(config).save_pretrained(folder / "hf")
    convert(["blip", str(folder / "hf"), str(folder / "blip"), "--tokenizer", _words(folder)])
    return {"model.init": folder / "blip", "model.image_size": 32}


def clip(folder: Path) -> dict[str, object]:
    return {"model.pair": save_pair(folder / "clip", "clip"), "model.fusion.num_heads": 4}


def siglip(folder: Path) -> dict[str, object]:
    return {"model.pair": save_pair(folder / "siglip", "siglip"), "model.fusion.num_heads": 4}


def from_backbones(folder: Path) -> dict[str, object]:
    small = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return {
        "model.vision.pretrained": False,
        "model.vision.image_size": 32,
        "model.vision.kwargs": json.dumps(small),
        "model.text.name": save_bert(folder / "bert"),
        "model.text.num_layers": 2,
        "model.fusion.num_layers": 2,
    }


def frozen(folder: Path) -> dict[str, object]:
    return {
        "model.vision.name": "test_vit",
        "model.vision.pretrained": False,
        "model.vision.image_size": 32,
        "model.text.name": save_bert(folder / "bert"),
        "data.cache_tokens": folder / "cache",
        "data.cache_text_tokens": folder / "cache",
    }


TOYS = {
    "albef_coco": albef,
    "albef_flickr30k": albef,
    "blip_coco": blip,
    "clip_b16_coco": clip,
    "siglip2_b16_coco": siglip,
    "pretrain_4m": from_backbones,
    "few_photos": frozen,
}


def test_no_config_is_left_out():
    # These two have tests of their own.
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*TOYS, "scenes", "flickr8k"}


FAST = ("albef_coco", "pretrain_4m", "few_photos")
SETUPS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TOYS]


@pytest.mark.parametrize("name", SETUPS)
def test_one_step(name, tmp_path):
    toy = {
        **TOYS[name](tmp_path),
        **_data(tmp_path, name),
        "data.num_workers": 0,
        "train.output_dir": tmp_path / "run",
        "train.batch_size": 8,
        "train.max_steps": 1,
        "train.tracker": "none",
        "validation.every_epochs": 0,
        "validation.final_rerank": 4,
    }
    overrides = [f"--{option}={value}" for option, value in toy.items()]
    options = parse(PretrainOptions, [f"--config={CONFIGS / f'{name}.yaml'}", *overrides])
    reset_accelerate()
    try:
        with without_curves():
            metrics = make_trainer(options).run()
    finally:
        reset_accelerate()
    assert metrics["training"]["steps"] == 1 and metrics["num_images"] > 0
    said = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    done = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert done["objective"].items() >= said["objective"].items()
    model = LoopITRModel.from_pretrained(tmp_path / "run")
    assert model.config.fusion["style"] == ("shared" if name.startswith("blip") else "late")


def _words(folder: Path) -> str:
    word_tokenizer(scene_vocabulary(), max_length=30).save_pretrained(folder / "words")
    return str(folder / "words")


def _data(folder: Path, name: str) -> dict[str, object]:
    """The published data's layout with other pictures."""
    images = folder / "images"
    images.mkdir()
    for number in range(IMAGES):
        (images / f"{number}.jpg").write_bytes(jpeg(number))
    if name == "pretrain_4m":
        lists = [folder / "first.json", folder / "second.json"]
        for offset, path in enumerate(lists):
            rows = [{"image": f"{n}.jpg", "caption": captions(n, 1)[0]} for n in range(offset, IMAGES, 2)]
            path.write_text(json.dumps(rows))
        files = json.dumps([str(path) for path in lists])
        return {"data.albef": files, "data.images": images, "data.val_fraction": 0.3}
    splits = ["train"] * 10 + ["val"] * 3 + ["test"] * 3
    entries = [
        {"filename": f"{n}.jpg", "split": split, "imgid": n, "sentences": [{"raw": raw} for raw in captions(n, 2)]}
        for n, split in enumerate(splits)
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": entries}))
    return {"data.karpathy": folder / "dataset.json", "data.images": images}
