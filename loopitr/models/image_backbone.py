"""timm image backbones behind one face: pixels -> tokens -> pooled vector.

The only file that knows timm's quirks; `text_backbone.py` knows those of transformers' text encoders.
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

# The table leads from transformers' names to timm's.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
# timm gives these names to what stands behind a backbone's last layer.
HEADS = ("head", "fc_norm", "attn_pool", "conv_head", "norm_head", "final_conv")


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
        # Whether batch norm keeps its statistics in training mode; its scales and shifts are trained either way.
        self.hold_statistics = False
        self.model: Any = create_timm(vision["name"], self.image_size, vision["kwargs"])
        # transformers' initialisation must leave timm's own alone.
        module: Any
        for module in self.model.modules():
            module._is_hf_initialized = True
        self.num_prefix_tokens: int = getattr(self.model, "num_prefix_tokens", 0)
        self._unused = self._unused_head(self._inspect())
        self.freeze_unused_head()
        if self.pooling == "first" and self.num_prefix_tokens == 0:
            raise ValueError(f"vision_pooling 'first' needs a class token; {vision['name']!r} has none, use 'mean'")

    def _inspect(self) -> set[nn.Module]:
        """Read token count, layout and widths off one dry run: timm's attributes do not give them for every model.

        Returns the modules that ran.
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
        """How pixels lie in memory: plane by plane, or the channels of each pixel side by side, which makes
        convolutions up to 1.7 times as fast on a CPU. The weights stay as they are saved, since converting them in each
        call costs little.
        """
        if not self.is_map or self.channels_last:
            return torch.contiguous_format
        try:
            self.model.forward_features(blank.contiguous(memory_format=torch.channels_last))
        except RuntimeError:  # a network that views its maps as rows
            return torch.contiguous_format
        return torch.channels_last

    def _unused_head(self, ran: set[nn.Module]) -> set[str]:
        """Names of a head's parameters that `first` or `mean` pooling goes past."""
        left_out = {name for name, module in self.model.named_modules() if module not in ran}
        names = (name for name, _ in self.model.named_parameters() if name.partition(".")[0] in HEADS)
        return {name for name in names if name.rpartition(".")[0] in left_out}

    def freeze_unused_head(self) -> None:
        """What goes unused gets no gradient, and DDP wants one of every parameter that is trained."""
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
        if self.is_map:  # The head of a VGG or CLIP ResNet knows rows from columns.
            tokens = tokens.unflatten(1, self.grid)  # [B, H, W, D]
            tokens = tokens if self.channels_last else tokens.permute(0, 3, 1, 2)
        return self.model.forward_head(tokens, pre_logits=True)  # [B, D']

    def resize(self, image_size: int) -> None:
        """Take images of another size; a ViT's positional embedding is interpolated (timm's `set_input_size`)."""
        if image_size == self.image_size:
            return
        set_size = getattr(self.model, "set_input_size", None)
        # A Swin would scale its windows too, and would then not be the model that its name and arguments describe.
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
        """Trade time for memory in the backbone's blocks."""
        self.model.set_grad_checkpointing(enable)

    def restore_buffers(self, config: DualEncoderConfig) -> None:
        """Recompute buffers that no checkpoint holds: transformers leaves them unset after loading."""
        kept = self.model.state_dict().keys()
        missing = [name for name, _ in self.model.named_buffers() if name not in kept]
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
    """A timm model without classifier; `pretrained`: with weights from timm's hub, fitted to the image size.

    Raises:
        ValueError: unknown name, or a patch that does not divide the image size.
    """
    import timm  # Importing it takes a second, so it waits until it is used.
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
    """Weights of a ViT for `model`: positional embeddings are resampled to its image size."""
    from timm.models import VisionTransformer, eva, vision_transformer

    if isinstance(model, VisionTransformer):
        return vision_transformer.checkpoint_filter_fn(weights, model)
    # DINOv3 is an Eva too.
    return eva.checkpoint_filter_fn(weights, model) if isinstance(model, eva.Eva) else weights


def mlp_ratio(inner: int, width: int) -> float:
    """timm's argument for a feed-forward layer of `inner` units; it rounds width x ratio down."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


@dataclass(frozen=True)
class VisionData:
    """How a timm backbone wants its pixels: `mean`, `std` (per channel, of values in 0..1) and `interpolation`."""

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
