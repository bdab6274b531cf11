"""Small random text encoders of every family."""

from __future__ import annotations

from typing import Any

import torch
from helpers.support import BERT, SIZES, ragged_texts

from loopitr import DualEncoderConfig
from loopitr.models.text_backbone import TextBackbone

TOWER: dict[str, Any] = {**SIZES, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
TEXT: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": {**BERT, "model_type": "roberta", "pad_token_id": 0},
    "electra": {**BERT, "model_type": "electra", "embedding_size": 16},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 60,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "modernbert": {
        "model_type": "modernbert",
        **SIZES,
        **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")},
    },
    "xlm-roberta": {**BERT, "model_type": "xlm-roberta", "pad_token_id": 0},
    "clip": {**TOWER, "model_type": "clip_text_model"},
    "siglip": {**TOWER, "model_type": "siglip_text_model"},
    "siglip2": {**TOWER, "model_type": "siglip2_text_model", "projection_size": 40},
}
BERT_LAYERS = ("bert", "roberta", "electra", "xlm-roberta")


def text_backbone(text: dict[str, Any], pooling: str = "mean") -> TextBackbone:
    torch.manual_seed(0)
    return TextBackbone(DualEncoderConfig(text=text, text_pooling=pooling)).eval()


def ended_texts(count: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = ragged_texts(count, longest=longest)
    ids[torch.arange(count), mask.sum(1) - 1] = TOWER["eos_token_id"]
    return ids, mask
