"""One side of a dual encoder alone, for deployments that embed only images or only texts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loopitr.models.base import LoopITRPreTrainedModel
from loopitr.models.config import DualEncoderConfig, ImageTowerConfig, TextTowerConfig
from loopitr.models.heads import projection, unit_embeds
from loopitr.models.image_backbone import VisionBackbone
from loopitr.models.lora import inject_lora
from loopitr.models.text_backbone import TextBackbone


class ImageTower(LoopITRPreTrainedModel):
    """The image backbone of a dual encoder and its projection; it gives the same embeds as the dual encoder.

    Example:
        >>> import torch
        >>> from loopitr import ImageTower
        >>> config = ImageTower.config_class(vision={"name": "test_vit", "image_size": 32}, embed_dim=16)
        >>> ImageTower(config).eval().get_image_features(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """

    config_class = ImageTowerConfig
    base_model_prefix = "tower"

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__(config)
        any_config: Any = config  # A backbone reads only those fields of a dual encoder's config that a tower's has.
        self.vision = VisionBackbone(any_config)
        self.vision_projection = projection(config.projection, self.vision.pooled_width, config.embed_dim)
        if config.lora:
            inject_lora(self, config.lora)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, S, S]` -> embeds `[B, E]`, unit length."""
        return unit_embeds(self.vision_projection, self.vision.pool(self.vision(pixel_values)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The same as `get_image_features`."""
        return self.get_image_features(pixel_values)


class TextTower(LoopITRPreTrainedModel):
    """The text backbone of a dual encoder and its projection; it gives the same embeds as the dual encoder.

    Example:
        >>> import torch
        >>> from loopitr import TextTower
        >>> text = {"model_type": "bert", "vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2}
        >>> tower = TextTower(TextTower.config_class(text=text, embed_dim=16)).eval()
        >>> tower.get_text_features(torch.tensor([[2, 7, 3]])).shape
        torch.Size([1, 16])
    """

    config_class = TextTowerConfig
    base_model_prefix = "tower"
    main_input_name = "input_ids"

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__(config)
        any_config: Any = config
        self.text = TextBackbone(any_config)
        self.text_projection = projection(config.projection, self.text.pooled_width, config.embed_dim)
        if config.lora:
            inject_lora(self, config.lora)
        self.post_init()

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[T, L]` -> embeds `[T, E]`, unit length."""
        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        return unit_embeds(self.text_projection, self.text.pool(self.text(input_ids, mask), mask))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The same as `get_text_features`."""
        return self.get_text_features(input_ids, attention_mask)


TOWERS: dict[str, type[ImageTower] | type[TextTower]] = {"image": ImageTower, "text": TextTower}


def tower_config(config: DualEncoderConfig, tower: str) -> ImageTowerConfig | TextTowerConfig:
    """The config of one of a dual encoder's towers, `image` or `text`."""
    part = "vision" if tower == "image" else "text"
    lora = {name: given for name, given in (config.lora or {}).items() if name == part} or None
    own = {name: getattr(config, name) for name in (part, f"{part}_pooling", "embed_dim", "projection")}
    return ImageTowerConfig(**own, lora=lora) if tower == "image" else TextTowerConfig(**own, lora=lora)


def tower_prefixes(tower: str) -> tuple[str, str]:
    """The prefixes of a tower's parameter names, the same in a dual encoder and in the tower itself."""
    part = "vision" if tower == "image" else "text"
    return f"{part}.", f"{part}_projection."
