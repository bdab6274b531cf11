"""One interface to all timm image backbones: pixels -> tokens -> pooled vector.

This is the only module that deals with the differences between timm models; `text_backbone.py` deals with those
between text encoders.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loopitr.models.config import DualEncoderConfig
from loopitr.models.dry_run import dry_run

# Names of activations in transformers and in timm.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
# timm's names of the modules after a backbone's last layer.
HEADS = ("head", "fc_norm", "attn_pool", "conv_head", "norm_head", "final_conv")


class VisionBackbone(nn.Module):
    """Any timm model as `[B, 3, H, W] -> tokens [B, N, D] -> pooled [B, D']`.

    A ViT's prefix tokens come first; a CNN's feature map is flattened row by row. Pooling needs only the tokens, so
    cached tokens can be pooled without running the backbone.

    Raises:
        ValueError: timm has no such model, the image size is not a multiple of the patch size, or pooling is `first`
            and there is no prefix token.
    """

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        vision = config.vision
        self.image_size: int = vision["image_size"]
        self.pooling = config.vision_pooling
        # Whether batch norm keeps its statistics in training mode; its scales and shifts are trained in both cases.
        self.hold_statistics = False
        self.model: Any = create_timm(vision["name"], self.image_size, vision["kwargs"])
        # This flag keeps transformers from initialising again what timm has initialised.
        module: Any
        for module in self.model.modules():
            module._is_hf_initialized = True
        self.num_prefix_tokens: int = getattr(self.model, "num_prefix_tokens", 0)
        self._unused = self._unused_head(self._inspect())
        self.freeze_unused_head()
        if self.pooling == "first" and self.num_prefix_tokens == 0:
            raise ValueError(f"vision_pooling 'first' needs a class token; {vision['name']!r} has none, use 'mean'")

    def _inspect(self) -> set[nn.Module]:
        """Read token count, layout and widths off a dry run, since timm's attributes do not give them for every model.

        Returns the modules that were called.
        """
        weight = next(self.model.parameters())
        blank = torch.zeros(1, 3, self.image_size, self.image_size, device=weight.device, dtype=weight.dtype)
        with dry_run(self.model) as called:
            features = self.model.forward_features(blank)
            self.channels_last = features.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            self.is_map = features.ndim == 4
            self.memory_format = self._fastest_format(blank)
            # The rows and columns of a feature map.
            self.grid = tuple(features.shape[1:3] if self.channels_last else features.shape[2:])
            tokens = self._flatten(features)
            self.num_tokens, self.width = tokens.shape[1], tokens.shape[2]
            self.pooled_width = self.pool(tokens).shape[-1]
        return called

    def _fastest_format(self, blank: Tensor) -> torch.memory_format:
        """The memory format for the pixels: channels last for a CNN, where convolutions are up to 1.7 times as fast on
        a CPU. The weights keep their format, since converting them in each call costs little.
        """
        if not self.is_map or self.channels_last:
            return torch.contiguous_format
        try:
            self.model.forward_features(blank.contiguous(memory_format=torch.channels_last))
        except RuntimeError:  # Some networks call `view` on their maps, which needs them contiguous.
            return torch.contiguous_format
        return torch.channels_last

    def _unused_head(self, called: set[nn.Module]) -> set[str]:
        """Names of a head's parameters that `first` or `mean` pooling does not use."""
        unused = {name for name, module in self.model.named_modules() if module not in called}
        names = (name for name, _ in self.model.named_parameters() if name.partition(".")[0] in HEADS)
        return {name for name in names if name.rpartition(".")[0] in unused}

    def freeze_unused_head(self) -> None:
        """Stop training parameters that no output uses: DDP needs a gradient for every trained parameter."""
        for name in self._unused:
            self.model.get_parameter(name).requires_grad_(False)

    def _flatten(self, features: Tensor) -> Tensor:
        if not self.is_map:
            return features  # [B, N, D]
        return features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)  # [B, N, D]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values [B, 3, S, S]` -> tokens `[B, N, D]`."""
        size = self.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(f"pixel_values must be [B, 3, {size}, {size}], got {list(pixel_values.shape)}")
        pixel_values = pixel_values.contiguous(memory_format=self.memory_format)
        return self._flatten(self.model.forward_features(pixel_values))  # [B, N, D]

    def pool(self, tokens: Tensor) -> Tensor:
        """tokens `[B, N, D]` -> pooled `[B, D']`."""
        if self.pooling == "first":
            return tokens[:, 0]
        if self.pooling == "mean":
            return tokens[:, self.num_prefix_tokens :].mean(1)
        if self.is_map:  # The head of a VGG or CLIP ResNet needs the map's rows and columns.
            tokens = tokens.unflatten(1, self.grid)  # [B, H, W, D]
            tokens = tokens if self.channels_last else tokens.permute(0, 3, 1, 2)
        return self.model.forward_head(tokens, pre_logits=True)  # [B, D']

    def resize(self, image_size: int) -> None:
        """Change the image size; a ViT's positional embedding is interpolated (timm's `set_input_size`).

        Raises:
            ValueError: the model cannot change its image size, or the size is not a multiple of the patch size.
        """
        if image_size == self.image_size:
            return
        set_size = getattr(self.model, "set_input_size", None)
        # A Swin would scale its windows too, and would then no longer be the model that the config describes.
        windows = set_size is not None and "window_size" in inspect.signature(set_size).parameters
        if windows or (set_size is None and not self.is_map):
            change = f"from {self.image_size} to {image_size}"
            raise ValueError(f"{type(self.model).__name__} cannot change its image size {change}")
        if set_size is not None:
            _check_patch(self.model, image_size)
            set_size(img_size=(image_size, image_size))
        self.image_size = image_size
        self._inspect()

    def train(self, mode: bool = True) -> VisionBackbone:
        super().train(mode)
        if self.hold_statistics:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute the activations of the backbone's blocks in the backward pass, to save memory."""
        self.model.set_grad_checkpointing(enable)

    def restore_buffers(self, config: DualEncoderConfig) -> None:
        """Recompute the buffers that are not saved, which transformers leaves unset after loading."""
        saved = self.model.state_dict().keys()
        missing = [name for name, _ in self.model.named_buffers() if name not in saved]
        if missing:
            fresh = dict(create_timm(config.vision["name"], self.image_size, config.vision["kwargs"]).named_buffers())
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


def create_timm(name: str, image_size: int, kwargs: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """A timm model without classifier, with `pretrained` weights from timm's hub, fitted to the image size.

    Raises:
        ValueError: timm has no such model, or the image size is not a multiple of the patch size.
    """
    import timm  # This import takes a second, so it is not at the top.
    from timm.layers import LayerNorm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {name!r}" + (f"; similar: {', '.join(near)}" if near else ""))
    arguments = {"num_classes": 0, **kwargs}
    if "norm_eps" in arguments:  # timm wants a class, which JSON cannot hold.
        arguments["norm_layer"] = partial(LayerNorm, eps=arguments.pop("norm_eps"))
    try:
        model = timm.create_model(name, pretrained, img_size=image_size, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, pretrained, **arguments)  # A CNN takes images of any size.
    _check_patch(model, image_size)
    return model


def fit_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights for `model`: a ViT's positional embeddings are resampled to its image size."""
    from timm.models import VisionTransformer, eva, vision_transformer

    if isinstance(model, VisionTransformer):
        return vision_transformer.checkpoint_filter_fn(weights, model)
    # DINOv3 is an Eva too.
    return eva.checkpoint_filter_fn(weights, model) if isinstance(model, eva.Eva) else weights


def mlp_ratio(inner: int, width: int) -> float:
    """The `mlp_ratio` for which timm, which rounds width x ratio down, makes feed-forward layers of `inner` units."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


@dataclass(frozen=True)
class VisionData:
    """The preprocessing of a timm backbone: `mean` and `std` per channel (of values in 0..1), and `interpolation`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def vision_data(name: str) -> VisionData:
    """timm's data config of a model name (no weights needed)."""
    import timm
    from timm.data import resolve_data_config

    cfg = timm.get_pretrained_cfg(name)
    data = resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg is not None else {}, verbose=False)
    return VisionData(mean=tuple(data["mean"]), std=tuple(data["std"]), interpolation=data["interpolation"])
