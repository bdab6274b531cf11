"""Strict `from_pretrained`: only safetensors, no missing or unexpected weights, and all buffers restored."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from loopitr.models.foreign import check_shards, check_types, check_weights, config_of, one_line_errors
from loopitr.models.image_backbone import VisionBackbone
from loopitr.models.lora import Model, freeze_adapted, merge_lora

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


class LoopITRPreTrainedModel(PreTrainedModel):
    """Base class of the models: strict loading, and the settings that transformers reads."""

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def merge_lora(self: Model) -> Model:
        """A copy with its LoRA adapters merged into the weights: equal outputs, without peft."""
        return merge_lora(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or hub id.

        Raises:
            ValueError: the folder holds a model of another kind, or its weights do not fit its config.
            OSError: there is no such folder or hub id, or its safetensors files are missing or damaged.
        """
        path = str(pretrained_model_name_or_path)
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, kwargs.get("subfolder", ""), "config.json")):
            raise OSError(f"{path} holds no model: it has no config.json")
        hub_arguments = {name: value for name, value in kwargs.items() if name in HUB_ARGUMENTS}
        saved_config = config_of(path, **hub_arguments)
        assert cls.config_class is not None
        wanted = cls.config_class.model_type
        if saved_config.get("model_type") != wanted:
            raise ValueError(
                f"{path} holds a {saved_config.get('model_type')!r} model, {cls.__name__} loads {wanted!r}"
            )
        check_shards(path, str(kwargs.get("subfolder") or ""))
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        kwargs["ignore_mismatched_sizes"] = True  # transformers then returns the mismatches, which are named below.
        with one_line_errors(path):
            loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                keys = sorted(info[kind])
                raise ValueError(f"{path}: {kind.replace('_', ' ')} {keys[:5]} ({len(keys)} in all)")
        if info["mismatched_keys"]:
            name, saved, built = sorted(info["mismatched_keys"])[0]
            raise ValueError(
                f"{path}: config.json does not fit the weights: {name} is {list(saved)}, wanted {list(built)} "
                f"({len(info['mismatched_keys'])} in all)"
            )
        for module in model.modules():
            if isinstance(module, VisionBackbone):
                module.restore_buffers(model.config)
                module.freeze_unused_head()  # Loading has set requires_grad of all parameters.
        freeze_adapted(getattr(model, "dual", model))
        check_types(model, path, **hub_arguments)
        check_weights(model, path)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                # Weights mapped from the file break if the file changes, and may be unaligned, which changes last bits.
                tensor.data = tensor.data.clone()
        return (model, info) if wants_info else model
