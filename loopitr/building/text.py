"""Pretrained text encoders of transformers: what they are, their tokenizer, their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loopitr.models.foreign import check_no_kernel, one_line_errors
from loopitr.models.text_backbone import ALWAYS_FULL, text_class

# These are written out even where they are the defaults of the config's class, because the fusion head may copy them.
DESCRIBED = (
    *("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size"),
    *("hidden_act", "layer_norm_eps"),
)


@dataclass(frozen=True)
class PretrainedText:
    """A pretrained encoder and the names of those of its weights that were missing and are drawn at random."""

    model: PreTrainedModel
    random_names: set[str]


def load_text(source: str) -> PretrainedText:
    """The text encoder of a folder or hub id, also of one that holds a whole image-text model (CLIP, SigLIP).

    Raises:
        OSError, ValueError: it cannot be loaded, or only by running code of its own.
    """
    with one_line_errors(source):
        check_no_kernel(PreTrainedConfig.get_config_dict(source)[0], source)
        model_class = text_class(AutoConfig.from_pretrained(source, trust_remote_code=False).model_type)
        model, info = model_class.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    random_names = {name.removeprefix("text_model.") for name in info["missing_keys"]}
    return PretrainedText(getattr(model, "text_model", model), random_names)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """
    Raises:
        ValueError: it cannot pad, or cannot be loaded.
    """
    with one_line_errors(f"the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has no padding token")
    return tokenizer


def load_text_config(source: str, **changes: Any) -> PreTrainedConfig:
    """The config with changes; its text part, where the folder or hub id holds an image-text model."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config = getattr(config, "text_config", config)
    return type(config).from_dict(config.to_dict(), **changes)


def describe_text(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The config as `DualEncoderConfig.text` wants it.

    SigLIP's encoders see their padding, so the config has to have the tokenizer's: SigLIP 2's checkpoints leave
    SigLIP's id in it, and its tokenizer may pad on the left, which those weights were not trained for.
    """
    described = {**config.to_diff_dict(), "model_type": config.model_type}
    for name in DESCRIBED:
        if hasattr(config, name):
            described[name] = getattr(config, name)
    for name in ("architectures", "transformers_version", "_name_or_path", "dtype"):
        described.pop(name, None)
    if config.model_type in ALWAYS_FULL:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            described[name] = getattr(tokenizer, name)
        tokenizer.padding_side = "right"
    return described
