"""BLIP checkpoints of the original layout: the numbers of its formulas, written out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.support import images, ragged_texts
from helpers.tiny_blip import ENC, TEXT, VISION, actual, assert_equal, blip, expected
from torch import Tensor

from loopitr import LoopITRConfig, LoopITRModel
from loopitr.convert.blip import convert_blip

# The original layout


def original(depth: int = 2, layers: int = 2, seed: int = 3) -> dict[str, Tensor]:
    """A retrieval checkpoint of salesforce/BLIP: ViT of width 64, text of width 128, 60 words of which 59 is [ENC]."""
    generator = torch.Generator().manual_seed(seed)
    vision, text, embed = 64, 128, 16

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.15

    shapes: dict[str, tuple[int, int]] = {"vision_proj": (embed, vision), "text_proj": (embed, text)}
    shapes["itm_head"] = (2, text)
    norms = {"visual_encoder.norm": vision, "text_encoder.embeddings.LayerNorm": text}
    for i in range(depth):
        block = f"visual_encoder.blocks.{i}"
        shapes |= {f"{block}.attn.qkv": (3 * vision, vision), f"{block}.attn.proj": (vision, vision)}
        shapes |= {f"{block}.mlp.fc1": (96, vision), f"{block}.mlp.fc2": (vision, 96)}
        norms |= {f"{block}.norm1": vision, f"{block}.norm2": vision}
    for i in range(layers):
        layer = f"text_encoder.encoder.layer.{i}"
        for kind, width in (("attention", text), ("crossattention", vision)):
            shapes[f"{layer}.{kind}.self.query"] = shapes[f"{layer}.{kind}.output.dense"] = (text, text)
            shapes[f"{layer}.{kind}.self.key"] = shapes[f"{layer}.{kind}.self.value"] = (text, width)
            norms[f"{layer}.{kind}.output.LayerNorm"] = text
        shapes |= {f"{layer}.intermediate.dense": (72, text), f"{layer}.output.dense": (text, 72)}
        norms[f"{layer}.output.LayerNorm"] = text
    weights = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": random(shape[0]) for name, shape in shapes.items()}
    weights |= {f"{name}.weight": 1 + random(width) for name, width in norms.items()}
    weights |= {f"{name}.bias": random(width) for name, width in norms.items()}
    weights |= {
        "visual_encoder.cls_token": random(1, 1, vision),
        "visual_encoder.pos_embed": random(1, 1 + 4 * 4, vision),
        "visual_encoder.patch_embed.proj.weight": random(vision, 3, 8, 8),
        "visual_encoder.patch_embed.proj.bias": random(vision),
        "text_encoder.embeddings.word_embeddings.weight": random(60, text),
        "text_encoder.embeddings.position_embeddings.weight": random(24, text),
    }
    for name in list(weights):  # The momentum copies have other values.
        head, rest = name.split(".", 1)
        if head != "itm_head":
            weights[f"{head}_m.{rest}"] = random(*weights[name].shape)
    weights |= {
        "temp": torch.tensor(0.004),
        "text_encoder.embeddings.position_ids": torch.arange(24)[None],
        "image_queue": random(embed, 6),
        "text_queue": random(embed, 6),
        "idx_queue": torch.full((1, 6), -100),
        "ptr_queue": torch.zeros(1, dtype=torch.long),
    }
    return weights


def reference(weights: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What BLIP_Retrieval computes in evaluation, written out, one image and one unpadded text at a time."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(query.split(64, -1), key.split(64, -1), value.split(64, -1), strict=True)  # Heads have width 64.
        return torch.cat([(q @ k.T / 8).softmax(-1) @ v for q, k, v in parts], -1)

    def vit(image: Tensor) -> Tensor:
        kernel = weights["visual_encoder.patch_embed.proj.weight"]
        patches = F.conv2d(image[None], kernel, weights["visual_encoder.patch_embed.proj.bias"], stride=8)[0]
        x = torch.cat([weights["visual_encoder.cls_token"][0], patches.flatten(1).T])
        x = x + weights["visual_encoder.pos_embed"][0]
        for i in range(2):
            block = f"visual_encoder.blocks.{i}"
            qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6))
            x = x + linear(f"{block}.attn.proj", attend(*qkv.chunk(3, -1)))
            hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
            x = x + linear(f"{block}.mlp.fc2", hidden)
        return norm("visual_encoder.norm", x, 1e-6)

    def bert(tokens: Tensor, image: Tensor | None) -> Tensor:
        def attention(name: str, x: Tensor, states: Tensor) -> Tensor:
            parts = [linear(f"{name}.self.query", x)]
            parts += [linear(f"{name}.self.{part}", states) for part in ("key", "value")]
            return norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", attend(*parts)), 1e-12)

        x = weights["text_encoder.embeddings.word_embeddings.weight"][tokens]
        x = x + weights["text_encoder.embeddings.position_embeddings.weight"][: len(tokens)]
        x = norm("text_encoder.embeddings.LayerNorm", x, 1e-12)
        for i in range(2):
            layer = f"text_encoder.encoder.layer.{i}"
            x = attention(f"{layer}.attention", x, x)
            if image is not None:
                x = attention(f"{layer}.crossattention", x, image)
            inner = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", x)))
            x = norm(f"{layer}.output.LayerNorm", x + inner, 1e-12)
        return x

    tokens = [vit(image) for image in pixels]
    texts = [text[real.bool()] for text, real in zip(ids, mask, strict=True)]
    image_embeds = F.normalize(torch.stack([linear("vision_proj", t[0]) for t in tokens]), dim=-1)
    text_embeds = F.normalize(torch.stack([linear("text_proj", bert(t, None)[0]) for t in texts]), dim=-1)
    asked = [torch.cat([torch.tensor([ENC]), t[1:]]) for t in texts]  # [ENC] in the place of [CLS]
    logits = [torch.stack([linear("itm_head", bert(t, image)[0]) for t in asked]) for image in tokens]
    return image_embeds @ text_embeds.T, torch.stack(logits)


def write(tmp_path: Path, weights: dict[str, Tensor]) -> str:
    torch.save({"model": weights, "epoch": 5}, tmp_path / "model.pth")
    return str(tmp_path / "model.pth")


def test_original_numbers(tmp_path: Path) -> None:
    weights = original()
    batch = (images(3), *ragged_texts(9))
    model = convert_blip(write(tmp_path, weights))
    assert_equal(actual(model, *batch), reference(weights, *batch))
    assert model.dual.scale.item() == pytest.approx(250)  # This is beyond CLIP's 100.
    model.save_pretrained(tmp_path / "ours")
    again = LoopITRModel.from_pretrained(tmp_path / "ours")
    assert again.config.fusion["first_token_id"] == ENC
    assert_equal(actual(again, *batch), reference(weights, *batch))


def test_pretraining_layout_has_the_same_numbers(tmp_path: Path) -> None:
    weights = original()
    batch = (images(2), *ragged_texts(3))
    extra = {"text_decoder.bert.embeddings.word_embeddings.weight": torch.zeros(60, 128)}
    extra |= {"text_decoder.cls.predictions.bias": torch.zeros(60), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    assert_equal(actual(convert_blip(write(tmp_path, weights | extra)), *batch), reference(weights, *batch))


def test_without_enc_the_original_has_the_numbers_of_transformers(tmp_path: Path) -> None:
    """The one difference between the two (transformers issue 25629)."""
    vision = {**VISION, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 96, "layer_norm_eps": 1e-6}
    text = {**TEXT, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 72, "num_hidden_layers": 2}
    theirs = blip(vision, {**text, "layer_norm_eps": 1e-12})
    weights = original()
    names = {
        "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
        "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "visual_encoder.norm": "vision_model.post_layernorm",
        "visual_encoder.blocks": "vision_model.encoder.layers",
        "visual_encoder": "vision_model",
        ".norm1": ".layer_norm1",
        ".norm2": ".layer_norm2",
        ".attn.": ".self_attn.",
        ".proj.": ".projection.",
    }
    renamed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    kept = theirs.state_dict().keys()
    theirs.load_state_dict({name: value for name, value in renamed.items() if name in kept})
    batch = (images(2), *ragged_texts(4))
    model = convert_blip(write(tmp_path, weights))
    assert (actual(model, *batch)[1] - expected(theirs, *batch)[1]).abs().max() > 1e-2
    model.config.fusion["first_token_id"] = None
    assert_equal(actual(model, *batch), expected(theirs, *batch))


def test_enc_is_trained_by_matching_alone(tmp_path: Path) -> None:
    model = convert_blip(write(tmp_path, original()))
    ids, mask = ragged_texts(3)
    words = model.dual.text.model.get_input_embeddings().weight
    pairs = torch.tensor([[0, 0], [1, 2]])
    model.score_pairs(model.encode_images(images(2)), model.encode_texts(ids, mask), pairs).score.sum().backward()
    assert words.grad is not None
    assert words.grad[ENC].abs().sum() > 0 and words.grad[2].abs().sum() == 0  # 2 is [CLS] here


def test_image_size_as_the_original_interpolates(tmp_path: Path) -> None:
    weights = original()
    batch = (images(2, 48), *ragged_texts(3))
    got = actual(convert_blip(write(tmp_path, weights), image_size=48), *batch)
    positions = weights["visual_encoder.pos_embed"]
    grid = positions[:, 1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    weights["visual_encoder.pos_embed"] = torch.cat([positions[:, :1], grid], 1)
    assert_equal(got, reference(weights, *batch))
    with pytest.raises(ValueError, match="multiple of the patch size 8, got 33"):
        convert_blip(write(tmp_path, weights), image_size=33)


def test_a_checkpoint_of_another_kind_says_which_keys(tmp_path: Path) -> None:
    weights = original()
    lower = "text_encoder.encoder.layer.0.crossattention"  # ALBEF's lower layers have none of these.
    albef = {name: value for name, value in weights.items() if not name.startswith(lower)}
    with pytest.raises(ValueError, match=rf"missing {re.escape(lower)}\.\S+.*\(10 in all\)"):
        convert_blip(write(tmp_path, albef))
    with pytest.raises(ValueError, match=r"left over cls_head\.weight"):
        convert_blip(write(tmp_path, {**weights, "cls_head.weight": torch.zeros(2, 2)}))
    captions = {name: value for name, value in weights.items() if not name.startswith("text_encoder.")}
    with pytest.raises(ValueError, match=r"BLIP checkpoint.*missing text_encoder\.embeddings\.word_embeddings\.weight"):
        convert_blip(write(tmp_path, captions))
    with pytest.raises(ValueError, match=r"of another shape itm_head\.weight \[3, 128\] \(wanted \[2, 128\]\)"):
        convert_blip(write(tmp_path, {**weights, "itm_head.weight": torch.zeros(3, 128)}))
    with pytest.raises(ValueError, match="17 patches, wanted a square"):
        convert_blip(write(tmp_path, {**weights, "visual_encoder.pos_embed": torch.zeros(1, 18, 64)}))
    with pytest.raises(OSError, match="gone.pth"):
        convert_blip(str(tmp_path / "gone.pth"))


def test_first_token_id_needs_every_text_layer_shared() -> None:
    with pytest.raises(ValueError, match="first_token_id needs fusion.style 'shared', got 'late'"):
        LoopITRConfig(fusion={"first_token_id": 3})
    text = {"model_type": "bert", "vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    with pytest.raises(ValueError, match="first_token_id needs all 2 text layers shared, got 1"):
        LoopITRModel(LoopITRConfig(text=text, fusion={"style": "shared", "num_layers": 1, "first_token_id": 3}))
