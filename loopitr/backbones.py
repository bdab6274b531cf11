"""timm image backbones and transformers text backbones behind one face: inputs -> tokens -> pooled vector.

The only file that knows the quirks of either library.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from loopitr.config import DualEncoderConfig

QUERY_KEY_VALUE = {"query", "key", "value"}
BUCKETS = 4  # of captions by length

HEADS = ("head", "fc_norm", "attn_pool", "conv_head", "norm_head", "final_conv")  # what timm calls them


class VisionBackbone(nn.Module):
    """Any timm model as `[B, 3, H, W] -> tokens [B, N, D] -> pooled [B, D']`.

    A ViT's prefix tokens come first; a CNN's feature map is flattened row by row. Pooling works on the tokens
    alone, so tokens that were computed earlier can be pooled without the backbone.

    Raises:
        ValueError: unknown timm name, a patch that does not divide the image size, `first` pooling without a
            prefix token.
    """

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        vision = config.vision
        self.image_size: int = vision["image_size"]
        self.pooling = config.vision_pooling
        self.model: Any = _create_timm(vision["name"], self.image_size, vision["kwargs"])
        # HF's weight init must leave timm's own initialisation alone.
        module: Any
        for module in self.model.modules():
            module._is_hf_initialized = True
        self.num_prefix_tokens: int = getattr(self.model, "num_prefix_tokens", 0)
        self._freeze_unused_head(self._inspect())
        if self.pooling == "first" and self.num_prefix_tokens == 0:
            raise ValueError(f"vision_pooling 'first' needs a class token; {vision['name']!r} has none, use 'mean'")

    def _inspect(self) -> set[nn.Module]:
        """Read token count, layout and widths off one dry run: timm's attributes do not give them for every model.

        Returns the modules that ran.
        """
        ran: set[nn.Module] = set()
        hooks = [m.register_forward_hook(lambda module, *_: ran.add(module)) for m in self.model.modules()]
        weight = next(self.model.parameters())
        blank = torch.zeros(1, 3, self.image_size, self.image_size, device=weight.device, dtype=weight.dtype)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            features = self.model.forward_features(blank)
        self.channels_last = features.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        self.is_map = features.ndim == 4
        self.grid = tuple(features.shape[1:3] if self.channels_last else features.shape[2:])  # of a map
        tokens = self._flatten(features)
        self.num_tokens, self.width = tokens.shape[1], tokens.shape[2]
        with torch.no_grad():
            self.pooled_width = self.pool(tokens).shape[-1]
        self.model.train(training)
        for hook in hooks:
            hook.remove()
        return ran

    def _freeze_unused_head(self, ran: set[nn.Module]) -> None:
        """A head that `first` or `mean` pooling goes past gets no gradient, and DDP wants one of every parameter."""
        for name in HEADS:
            head = getattr(self.model, name, None)
            for module in head.modules() if isinstance(head, nn.Module) else ():
                if module not in ran:
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(False)

    def _flatten(self, features: Tensor) -> Tensor:
        if not self.is_map:
            return features  # [B, N, D]
        return features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)  # [B, N, D]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values [B, 3, S, S]` -> tokens `[B, N, D]`."""
        size = self.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(f"pixel_values must be [B, 3, {size}, {size}], got {list(pixel_values.shape)}")
        return self._flatten(self.model.forward_features(pixel_values))  # [B, N, D]

    def pool(self, tokens: Tensor) -> Tensor:
        """tokens `[B, N, D]` -> pooled `[B, D']`."""
        if self.pooling == "first":
            return tokens[:, 0]
        if self.pooling == "mean":
            return tokens[:, self.num_prefix_tokens :].mean(1)
        if self.is_map:  # the head of a VGG or CLIP ResNet knows rows from columns
            tokens = tokens.unflatten(1, self.grid)  # [B, H, W, D]
            tokens = tokens if self.channels_last else tokens.permute(0, 3, 1, 2)
        return self.model.forward_head(tokens, pre_logits=True)  # [B, D']

    def resize(self, image_size: int) -> None:
        """Take images of another size; a ViT's positional embedding is interpolated (timm's `set_input_size`)."""
        if image_size == self.image_size:
            return
        set_size = getattr(self.model, "set_input_size", None)
        # A Swin would scale its windows, and no longer be the model that its name and arguments describe.
        windows = set_size is not None and "window_size" in inspect.signature(set_size).parameters
        if windows or (set_size is None and not self.is_map):
            change = f"from {self.image_size} to {image_size}"
            raise ValueError(f"{type(self.model).__name__} cannot change its image size {change}")
        if set_size is not None:
            _check_patch(self.model, image_size)
            set_size(img_size=(image_size, image_size))
        self.image_size = image_size
        self._inspect()

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Trade time for memory in the backbone's blocks."""
        self.model.set_grad_checkpointing(enable)

    def restore_buffers(self, config: DualEncoderConfig) -> None:
        """Recompute buffers that no checkpoint holds: transformers leaves them unset after loading."""
        kept = self.model.state_dict().keys()
        missing = [name for name, _ in self.model.named_buffers() if name not in kept]
        if missing:
            fresh = dict(_create_timm(config.vision["name"], self.image_size, config.vision["kwargs"]).named_buffers())
            own = dict(self.model.named_buffers())
            for name in missing:
                own[name].copy_(fresh[name])


def _check_patch(model: nn.Module, image_size: int) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        return
    side = patch[0] if isinstance(patch, tuple) else patch
    if image_size % side:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {side}")


def _create_timm(name: str, image_size: int, kwargs: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {name!r}" + (f"; similar: {', '.join(near)}" if near else ""))
    arguments = {"num_classes": 0, **kwargs}
    try:
        model = timm.create_model(name, img_size=image_size, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, **arguments)  # a CNN: any size does
    _check_patch(model, image_size)
    return model


@dataclass(frozen=True)
class VisionData:
    """How a timm backbone wants its pixels: `mean`, `std` (per channel, of values in 0..1) and `interpolation`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def vision_data(name: str) -> VisionData:
    """timm's data config of a model name (no weights needed)."""
    cfg = timm.get_pretrained_cfg(name)
    data = resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg is not None else {}, verbose=False)
    return VisionData(mean=tuple(data["mean"]), std=tuple(data["std"]), interpolation=data["interpolation"])


def _max_length(model: nn.Module) -> int:
    limit = getattr(model.config, "max_position_embeddings", None) or 512
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return limit if padding is None else limit - padding - 1  # RoBERTa counts positions from its padding index


def _is_bert_layer(layer: nn.Module) -> bool:
    attention = getattr(getattr(layer, "attention", None), "self", None)
    if not isinstance(attention, nn.Module):
        return False
    parts = {name for name, _ in attention.named_children()} - {"dropout"}
    # More than these, as in ConvBERT and DeBERTa, is another kind of attention.
    return parts == QUERY_KEY_VALUE and hasattr(layer, "intermediate") and hasattr(layer.output, "LayerNorm")


@dataclass
class TextTokens:
    """`tokens [T, L, D]` of the last layer; `inner [T, L, D]`: the hidden state that `shared` fusion starts from."""

    tokens: Tensor
    inner: Tensor | None
    pooler_output: Tensor | None


class TextBackbone(nn.Module):
    """Any transformers encoder with a `last_hidden_state` as `[T, L] -> tokens [T, L, D] -> pooled [T, D]`."""

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        arguments = dict(config.text)
        text_config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
        text_config = getattr(text_config, "text_config", text_config)
        self.pooling = config.text_pooling
        self.model = AutoModel.from_config(text_config)
        if self.pooling != "backbone" and getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # parameters that no output depends on break DDP
        self.width: int = text_config.hidden_size
        self.max_length = _max_length(self.model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, inner_layer: int | None = None) -> TextTokens:
        """Run the backbone once; `inner_layer` also keeps the input of that layer (0: the embeddings)."""
        if input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"captions of {input_ids.shape[1]} tokens are longer than the text backbone takes ({self.max_length})"
            )
        if len(input_ids) < 2 * BUCKETS or torch.compiler.is_compiling():
            return self._run(self.model.get_input_embeddings()(input_ids), attention_mask, inner_layer)
        # Captions of 14 tokens beside one of 40: short and long ones apart, each bucket padded to its own longest.
        positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        lengths, order = (attention_mask.bool() * positions).amax(1).sort()
        rows = order.chunk(BUCKETS)
        longest = torch.stack([bucket[-1] for bucket in lengths.chunk(BUCKETS)]).clamp(min=1).tolist()
        words = self.model.get_input_embeddings()(input_ids)  # once: each look-up has a gradient as large as the table
        parts = [
            self._run(words[chosen, :length], attention_mask[chosen, :length], inner_layer)
            for chosen, length in zip(rows, longest, strict=True)
        ]
        back = order.argsort()

        def together(tensors: list[Tensor | None]) -> Tensor | None:
            full = [F.pad(x, (0, 0, 0, input_ids.shape[1] - x.shape[1])) for x in tensors if x is not None]
            return torch.cat(full)[back] if full else None

        tokens = together([part.tokens for part in parts])
        assert tokens is not None
        pooled = [part.pooler_output for part in parts if part.pooler_output is not None]
        return TextTokens(tokens, together([part.inner for part in parts]), torch.cat(pooled)[back] if pooled else None)

    def _run(self, words: Tensor, attention_mask: Tensor, inner_layer: int | None) -> TextTokens:
        output = self.model(
            inputs_embeds=words, attention_mask=attention_mask, output_hidden_states=inner_layer is not None
        )
        return TextTokens(
            tokens=output.last_hidden_state,
            inner=None if inner_layer is None else output.hidden_states[inner_layer],
            pooler_output=getattr(output, "pooler_output", None),
        )

    def pool(self, output: TextTokens, attention_mask: Tensor) -> Tensor:
        """-> pooled `[T, D]`."""
        if self.pooling == "backbone":
            if output.pooler_output is None:
                raise ValueError(f"{type(self.model).__name__} has no pooling of its own; use 'first' or 'mean'")
            return output.pooler_output
        if self.pooling == "first":
            return output.tokens[:, 0]
        mask = attention_mask.unsqueeze(-1).to(output.tokens.dtype)
        return (output.tokens * mask).sum(1) / mask.sum(1).clamp(min=1)  # [T, D]

    @property
    def layers(self) -> list[nn.Module]:
        """The encoder layers of a BERT-type backbone, for `shared` fusion."""
        layers = getattr(getattr(self.model, "encoder", None), "layer", None)
        if layers is None or not all(_is_bert_layer(layer) for layer in layers):
            raise ValueError(f"fusion.style 'shared' needs BERT-type layers; {type(self.model).__name__} has none")
        return list(layers)
