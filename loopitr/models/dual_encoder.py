"""`DualEncoder`: the part of the network that embeds images and texts separately; it can be used alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loopitr.models.base import LoopITRPreTrainedModel
from loopitr.models.config import DualEncoderConfig
from loopitr.models.heads import limit_log_scale, limited_scale, projection, unit_embeds
from loopitr.models.image_backbone import VisionBackbone
from loopitr.models.lora import inject_lora
from loopitr.models.outputs import DualOutput
from loopitr.models.text_backbone import TextBackbone, TextOutput


class DualEncoder(LoopITRPreTrainedModel):
    """An image and a text backbone with a projection each; the dot product of two embeds is their similarity.

    Example:
        >>> import torch
        >>> from loopitr import DualEncoder, DualEncoderConfig
        >>> config = DualEncoderConfig(
        ...     vision={"name": "test_vit", "image_size": 32},
        ...     text={"model_type": "bert", "vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2},
        ...     embed_dim=16,
        ... )
        >>> model = DualEncoder(config).eval()
        >>> images = model.get_image_features(torch.zeros(2, 3, 32, 32))
        >>> texts = model.get_text_features(torch.tensor([[2, 7, 3]]))
        >>> (images @ texts.T).shape
        torch.Size([2, 1])
    """

    config_class = DualEncoderConfig
    base_model_prefix = "dual"

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__(config)
        self.vision = VisionBackbone(config)
        self.text = TextBackbone(config)
        kind, dropout = config.projection, config.projection_dropout
        self.vision_projection = projection(kind, self.vision.pooled_width, config.embed_dim, dropout=dropout)
        self.text_projection = projection(kind, self.text.pooled_width, config.embed_dim, dropout=dropout)
        self.logit_scale = nn.Parameter(torch.tensor(1.0 / config.initial_temperature).log())
        self.logit_bias: nn.Parameter | None = None
        if config.initial_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.initial_logit_bias)))
        if config.lora:
            inject_lora(self, config.lora)
        self.post_init()

    @property
    def scale(self) -> Tensor:
        """1 / temperature, at most `config.max_logit_scale`."""
        return limited_scale(self.logit_scale, self.config.max_logit_scale)

    def limit_scale(self) -> None:
        """Keep the trained temperature within its limit; call this after every optimiser step."""
        limit_log_scale(self.logit_scale, self.config.max_logit_scale)

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """Image tokens `[B, N, D]` -> embeds `[B, E]`, unit length."""
        return self.embed_pooled_images(self.vision.pool(tokens))

    def embed_pooled_images(self, pooled: Tensor) -> Tensor:
        """Pooled images `[B, D']` -> embeds `[B, E]`, unit length."""
        return unit_embeds(self.vision_projection, pooled)

    def embed_text_output(self, output: TextOutput, attention_mask: Tensor) -> Tensor:
        """The text backbone's output for `attention_mask [T, L]` -> embeds `[T, E]`, unit length."""
        return self.embed_pooled_texts(self.text.pool(output, attention_mask))

    def embed_pooled_texts(self, pooled: Tensor) -> Tensor:
        """Pooled texts `[T, D']` -> embeds `[T, E]`, unit length."""
        return unit_embeds(self.text_projection, pooled)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, S, S]` -> embeds `[B, E]`, unit length."""
        return self.embed_image_tokens(self.vision(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[T, L]` -> embeds `[T, E]`, unit length."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.embed_text_output(self.text(input_ids, mask), mask)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> DualOutput:
        """Similarities of all images with all texts, in full precision so that close ones do not tie; no loss."""
        image_embeds = self.get_image_features(pixel_values)
        text_embeds = self.get_text_features(input_ids, attention_mask)
        with torch.autocast(image_embeds.device.type, enabled=False):
            logits = self.scale * image_embeds @ text_embeds.T  # [B, T]
            if self.logit_bias is not None:
                logits = logits + self.logit_bias
        return DualOutput(
            image_embeds=image_embeds, text_embeds=text_embeds, logits_per_image=logits, logits_per_text=logits.T
        )

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.vision.set_gradient_checkpointing(enable)
        self.text.model._set_gradient_checkpointing(enable, *args, **kwargs)
