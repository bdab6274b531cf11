"""Pretrained text encoders of transformers: config, tokenizer and weights."""

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

from loopitr.models.foreign import check_types, config_of, one_line_errors
from loopitr.models.processor_files import check_vocabulary
from loopitr.models.text_backbone import ALWAYS_FULL, text_class

# These are saved even if they are defaults of the config's class, because the fusion head may copy them.
DESCRIBED = (
    *("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size"),
    *("hidden_act", "layer_norm_eps"),
)


@dataclass(frozen=True)
class PretrainedText:
    """A pretrained encoder, and the names of its weights that were missing and so are random."""

    model: PreTrainedModel
    random_names: set[str]


def load_text(source: str) -> PretrainedText:
    """The text encoder of a folder or hub id, also from a whole image-text model (CLIP, SigLIP).

    Raises:
        OSError, ValueError: it cannot be loaded, or only by running its own code.
    """
    with one_line_errors(source):
        config_of(source)
        model_class = text_class(AutoConfig.from_pretrained(source, trust_remote_code=False).model_type)
        model, info = model_class.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        check_types(model, source)
    random_names = {name.removeprefix("text_model.") for name in info["missing_keys"]}
    return PretrainedText(getattr(model, "text_model", model), random_names)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: it cannot be loaded, has no padding token, or gives two tokens one id.
    """
    with one_line_errors(f"the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has no padding token")
    check_vocabulary(tokenizer, source)
    return tokenizer


def load_text_config(source: str, **changes: Any) -> PreTrainedConfig:
    """The config of a folder or hub id, or its text part if it is an image-text model, with `changes`."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config = getattr(config, "text_config", config)
    return type(config).from_dict(config.to_dict(), **changes)


def describe_text(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The config as a dict for `DualEncoderConfig.text`.

    SigLIP's encoders attend to padding, so their config gets the tokenizer's padding id (SigLIP 2 checkpoints have that
    of SigLIP), and the tokenizer is set to pad on the right, as in training.
    """
    values = {**config.to_diff_dict(), "model_type": config.model_type}
    for name in DESCRIBED:
        if hasattr(config, name):
            values[name] = getattr(config, name)
    for name in ("architectures", "transformers_version", "_name_or_path", "dtype"):
        values.pop(name, None)
    if config.model_type in ALWAYS_FULL:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            values[name] = getattr(tokenizer, name)
        tokenizer.padding_side = "right"
    return values
