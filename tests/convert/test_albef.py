"""ALBEF's checkpoints give ALBEF's numbers, in both layouts; what is no such checkpoint is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixtures.albef_tiny.plain import BERT, FUSION_LAYER, TEXT_HEADS, VISION_HEADS, fixture, plain_albef
from safetensors.torch import save_file
from torch import Tensor

from loopitr import LoopITRModel
from loopitr.convert import convert_albef
from loopitr.convert.weights import head_count, read_checkpoint

HEADS: dict[str, Any] = {"vision_heads": VISION_HEADS, "text_heads": TEXT_HEADS}
REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "albef_tiny"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def pretrain_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `ALBEF.pth`: the tied decoder twice, momentum copies of other values, queues."""
    mlm = "text_encoder.cls.predictions."
    weights = {**weights, f"{BERT}embeddings.position_ids": torch.arange(20)[None]}
    weights[f"{mlm}decoder.weight"] = weights[f"{BERT}embeddings.word_embeddings.weight"]
    weights[f"{mlm}decoder.bias"] = weights[f"{mlm}bias"]
    copied = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
    for name in [name for name in weights if name.startswith(copied)]:
        part, dot, rest = name.partition(".")
        weights[f"{part}_m{dot}{rest}"] = weights[name] + 1
    queues = {name: torch.randn(12, 8) for name in ("image_queue", "text_queue")}
    return weights | queues | {"queue_ptr": torch.zeros(1, dtype=torch.long)}


def retrieval_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the fine-tunes: no `bert.`, no masked-language-model head, one queue more."""
    weights = {name.replace(".bert.", "."): value for name, value in pretrain_layout(weights).items()}
    weights = {name: value for name, value in weights.items() if ".cls.predictions." not in name}
    return weights | {"idx_queue": torch.full((1, 8), -100)}


LAYOUTS = {"pretrain": pretrain_layout, "retrieval": retrieval_layout}


@pytest.fixture(params=LAYOUTS)
def checkpoint(request, tmp_path):
    file = tmp_path / f"{request.param}.pth"
    torch.save({"model": LAYOUTS[request.param](fixture("weights")), "epoch": 29, "config": {"temp": 0.07}}, file)
    return file


@torch.no_grad()
def assert_gives(model: LoopITRModel, expected: dict[str, Tensor], **close: float) -> None:
    """All that `expected` holds: tokens, embeds, similarity, ITM logits of every pair."""
    pixels, ids, mask = (expected[name] for name in ("pixel_values", "input_ids", "attention_mask"))
    close = close or CLOSE
    images, texts = model.encode_images(pixels), model.encode_texts(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(images.tokens, expected["image_tokens"], **close)
    torch.testing.assert_close(texts.tokens[real], expected["text_tokens"][real], **close)
    torch.testing.assert_close(images.embeds, expected["image_embeds"], **close)
    torch.testing.assert_close(texts.embeds, expected["text_embeds"], **close)
    torch.testing.assert_close(model(pixels, ids, mask).logits_per_image, expected["similarity"], **close)
    assert len(expected["pairs"]) == len(pixels) * len(ids)
    scores = model.score_pairs(images, texts, expected["pairs"])
    torch.testing.assert_close(scores.logits, expected["itm_logits"], **close)


# Parity


def test_every_number_is_the_original_s(checkpoint):
    model = convert_albef(checkpoint, **HEADS)
    assert not model.training
    assert len(model.dual.text.layers) == FUSION_LAYER
    assert_gives(model, fixture("expected"))


@torch.no_grad()
def test_the_masked_language_model_head_is_kept(tmp_path):
    expected = fixture("expected")
    for name, layout in LAYOUTS.items():
        torch.save(layout(fixture("weights")), tmp_path / f"{name}.pth")
    assert convert_albef(tmp_path / "retrieval.pth", **HEADS).mlm_head is None
    model = convert_albef(tmp_path / "pretrain.pth", **HEADS)
    assert model.mlm_head is not None
    images = model.encode_images(expected["pixel_values"])
    texts = model.encode_texts(expected["input_ids"], expected["attention_mask"])
    fused = model.fused_tokens(images, texts, expected["pairs"])
    logits = model.mlm_head(fused, model.dual.text.model.get_input_embeddings().weight)
    real = expected["attention_mask"].bool()[expected["pairs"][:, 1]]  # [P, L]
    torch.testing.assert_close(logits, expected["mlm_logits"][real], **CLOSE)


@torch.no_grad()
def test_the_saved_folder_gives_the_same_bits(checkpoint, tmp_path):
    model, expected = convert_albef(checkpoint, **HEADS), fixture("expected")
    model.save_pretrained(tmp_path / "out")
    again = LoopITRModel.from_pretrained(tmp_path / "out").eval()
    assert_gives(again, expected)
    own, loaded = model.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own)
    inputs = [expected[name] for name in ("pixel_values", "input_ids", "attention_mask")]
    assert torch.equal(model(*inputs).logits_per_image, again(*inputs).logits_per_image)


@pytest.mark.parametrize("size", [16, 40])
def test_another_image_size_interpolates_positions_as_the_original(size, tmp_path):
    weights, expected = fixture("weights"), fixture("expected")
    torch.save(pretrain_layout(weights), tmp_path / "albef.pth")
    inputs = {**expected, "pixel_values": torch.randn(2, 3, size, size)}
    positions = weights["visual_encoder.pos_embed"]
    grid = positions[0, 1:].reshape(3, 3, -1).permute(2, 0, 1)[None]  # [1, D, 3, 3]
    grid = F.interpolate(grid, size=(size // 8, size // 8), mode="bicubic", align_corners=False)
    grid = grid[0].permute(1, 2, 0).reshape(1, (size // 8) ** 2, -1)
    weights["visual_encoder.pos_embed"] = torch.cat([positions[:, :1], grid], 1)
    outputs = plain_albef(weights, inputs, **HEADS, fusion_layer=FUSION_LAYER)
    assert_gives(convert_albef(tmp_path / "albef.pth", image_size=size, **HEADS), inputs | outputs)


@torch.no_grad()
def test_a_temperature_below_a_hundredth_is_not_clamped(tmp_path):
    torch.save({**fixture("weights"), "temp": torch.tensor(0.002)}, tmp_path / "albef.pth")
    converted, expected = convert_albef(tmp_path / "albef.pth", **HEADS), fixture("expected")
    converted.save_pretrained(tmp_path / "out")
    for model in (converted, LoopITRModel.from_pretrained(tmp_path / "out")):
        assert model.dual.scale.item() == pytest.approx(500, rel=1e-5)
        logits = model(*(expected[name] for name in ("pixel_values", "input_ids", "attention_mask"))).logits_per_image
        torch.testing.assert_close(logits, expected["similarity"] * 0.07 / 0.002, atol=1e-3, rtol=1e-5)


def test_half_precision_weights_become_single(tmp_path):
    torch.save({name: value.half() for name, value in fixture("weights").items()}, tmp_path / "albef.pth")
    model = convert_albef(tmp_path / "albef.pth", **HEADS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_of_the_original_implementation(layout):
    file = REFERENCE / f"albef_{layout}.pth"
    if not file.is_file():
        pytest.skip(f"no outputs of the original implementation at {REFERENCE}")
    expected = read_checkpoint(REFERENCE / "expected.safetensors")
    assert_gives(convert_albef(file, vision_heads=4, text_heads=4), expected)
    text = BERT if layout == "pretrain" else "text_encoder."
    plain = plain_albef(read_checkpoint(file), expected, vision_heads=4, text_heads=4, fusion_layer=2, text=text)
    for name in plain.keys() & expected.keys():  # The code that wrote the fixture is ALBEF too.
        torch.testing.assert_close(plain[name], expected[name], **CLOSE)


# What no shape tells


def test_heads_are_the_width_over_64_unless_given(tmp_path):
    assert head_count(768, None, "--text-heads") == 12 and head_count(768, 8, "--text-heads") == 8
    torch.save(fixture("weights"), tmp_path / "albef.pth")
    for given, complaint in (
        ({"text_heads": 2}, "width 24: give --vision-heads"),
        ({"vision_heads": 3}, "width 16: give --text-heads"),
        ({"vision_heads": 5, "text_heads": 2}, "--vision-heads is 5, wanted a divisor of the width 24"),
        ({"vision_heads": 3, "text_heads": 0}, "--text-heads is 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            convert_albef(tmp_path / "albef.pth", **given)
    with pytest.raises(ValueError, match="image size 30 is not a multiple of the patch size 8"):
        convert_albef(tmp_path / "albef.pth", image_size=30, **HEADS)


# Other checkpoints


def without(weights: dict[str, Tensor], *beginnings: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith(beginnings)}


@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        (  # This is a bare ViT.
            lambda w: {n.removeprefix("visual_encoder."): v for n, v in w.items() if n.startswith("visual")},
            ["missing visual_encoder.pos_embed", "10 in all", "left over blocks.0.attn.proj.bias, blocks"],
        ),
        (lambda w: without(w, "vision_proj", "temp") | {"text_decoder.x": torch.ones(1)}, ["left over text_decoder.x"]),
        (lambda w: without(w, "itm_head.bias"), ["missing itm_head.bias"]),
        (lambda w: without(w, f"{BERT}encoder.layer.3"), ["missing text_encoder.bert.encoder.layer.3.", "26 in all"]),
        (lambda w: w | {"itm_head.more": torch.ones(1), "cls.x": torch.ones(2)}, ["left over itm_head.more, cls.x"]),
        (lambda w: w | {"itm_head.weight": torch.ones(3, 16)}, ["itm_head.weight [3, 16] (wanted [2, 16])"]),
        (lambda w: w | {"temp": torch.ones(1)}, ["of another shape temp [1]"]),
        (lambda w: w | {"visual_encoder.pos_embed": torch.ones(1, 8, 24)}, ["visual_encoder.pos_embed [1, 8, 24]"]),
        (  # BLIP
            lambda w: w | {f"{BERT}encoder.layer.0.crossattention.self.key.bias": torch.ones(16)},
            ["left over text_encoder.bert.encoder.layer.0.crossattention.self.key.bias"],
        ),
        (  # These weights should be tied.
            lambda w: w | {"text_encoder.cls.predictions.decoder.bias": torch.ones(60)},
            ["left over text_encoder.cls.predictions.decoder.bias"],
        ),
        (lambda w: w | {"temp": torch.tensor(0.0)}, ["temp is 0.0, wanted a positive temperature"]),
    ],
)
def test_another_kind_of_checkpoint_is_known_by_its_keys(change, complaints, tmp_path):
    file = tmp_path / "other.pth"
    torch.save(change(fixture("weights")), file)
    with pytest.raises(ValueError) as raised:
        convert_albef(file, **HEADS)
    for complaint in complaints:
        assert complaint in str(raised.value)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


# Reading files


def test_wrappers_are_undone_and_safetensors_read(tmp_path):
    weights = {"a": torch.ones(2)}
    torch.save({"model": {"state_dict": weights}, "optimizer": {"lr": 1.0}}, tmp_path / "a.pth")
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights | {"epoch": 3}, tmp_path / "a.bin")
    for name in ("a.pth", "a.safetensors", "a.bin"):
        actual = read_checkpoint(tmp_path / name)
        assert actual.keys() == {"a"} and torch.equal(actual["a"], weights["a"])


class Runs:
    """Unpickling it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        import os

        return os.mkdir, (self.folder,)


def test_a_file_that_is_no_checkpoint_is_named_in_one_line(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "args": Runs(tmp_path / "made")}, tmp_path / "objects.pth")
    torch.save({"a": torch.ones(500)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-400])
    (tmp_path / "text.pth").write_text("hello, this is not a checkpoint\n")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    for name, kind, complaint in (
        ("none.pth", OSError, "no checkpoint file"),
        (".", OSError, "is a folder"),
        ("objects.pth", ValueError, "Python objects besides tensors"),
        ("cut.pth", ValueError, "or is incomplete"),
        ("text.pth", ValueError, "is not a checkpoint"),
        ("empty.bin", ValueError, "is not a checkpoint"),
        ("broken.safetensors", ValueError, "not a complete safetensors file"),
        ("list.pth", ValueError, "holds a list"),
        ("epoch.pth", ValueError, "holds no weights, only epoch"),
    ):
        with pytest.raises(kind) as raised:
            convert_albef(tmp_path / name)
        message = str(raised.value)
        assert complaint in message and str(tmp_path) in message and "\n" not in message, message
    assert not (tmp_path / "made").exists()


def test_scale_is_clamped_where_the_config_says():
    from loopitr import LoopITRConfig

    config = LoopITRConfig(max_logit_scale=1000.0)
    assert config.dual_config().max_logit_scale == 1000 and LoopITRConfig().dual_config().max_logit_scale == 100
    assert math.isclose(LoopITRConfig.from_dict(config.to_dict()).max_logit_scale, 1000)
    with pytest.raises(ValueError, match="max_logit_scale must be above 0, got 0"):
        LoopITRConfig(max_logit_scale=0)
