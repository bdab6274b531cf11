"""Random tiny BLIP models of transformers, and what they and ours give for every pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForImageTextRetrieval

from loopitr import LoopITRModel

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-3,
}
TEXT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 24,
    "layer_norm_eps": 1e-4,
    "bos_token_id": 58,
    "sep_token_id": 57,
}
ENC = 59


def blip(vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT, seed: int = 0) -> BlipForImageTextRetrieval:
    """Random, every bias and norm shaken, so that a missing or exchanged one shows."""
    torch.manual_seed(seed)
    model = BlipForImageTextRetrieval(BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.05))
    return model.eval()


def saved(tmp_path: Path, **kwargs: Any) -> tuple[BlipForImageTextRetrieval, str]:
    model = blip(**kwargs)
    model.save_pretrained(tmp_path / "hf")
    return model, str(tmp_path / "hf")


@torch.no_grad()
def expected(model: Any, pixels: Tensor, ids: Tensor, mask: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """transformers' cosine similarity `[B, T]` and ITM logits `[B, T, 2]`, every pair by itself."""
    cosine = model(ids, pixels, use_itm_head=False, attention_mask=mask, **kwargs).itm_score
    logits = [
        [model(ids[t : t + 1], image, attention_mask=mask[t : t + 1], **kwargs).itm_score[0] for t in range(len(ids))]
        for image in pixels.split(1)
    ]
    return cosine, torch.stack([torch.stack(row) for row in logits])


@torch.no_grad()
def actual(model: LoopITRModel, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    image_state, text_state = model.encode_images(pixels), model.encode_texts(ids, mask)
    pairs = torch.cartesian_prod(torch.arange(len(pixels)), torch.arange(len(ids)))
    logits = model.score_pairs(image_state, text_state, pairs).logits
    return image_state.embeds @ text_state.embeds.T, logits.unflatten(0, (len(pixels), len(ids)))


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for name, got, wanted in zip(("similarity", "ITM logits"), ours, theirs, strict=True):
        assert wanted.std() > 1e-3, f"{name} hardly differ between pairs: nothing is tested"
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
