"""`LoopITRModel`: one network that is a dual encoder (`dual_encoder.py`) and a cross encoder.

It computes no losses; those are in `objective/`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loopitr.models.agreement import TokenAgreement
from loopitr.models.base import LoopITRPreTrainedModel
from loopitr.models.compiling import compile_in_place
from loopitr.models.config import LoopITRConfig
from loopitr.models.dual_encoder import DualEncoder
from loopitr.models.fusion import FusionEncoder
from loopitr.models.heads import MLMHead, full_precision, outside_autocast
from loopitr.models.layout import (
    Arrangement,
    EagerArrangement,
    FixedArrangement,
    FusionInput,
    packed_tokens,
    unique_pairs,
)
from loopitr.models.lora import freeze_adapted
from loopitr.models.outputs import DualOutput, ImageState, PairScores, TextFeatures, TextState
from loopitr.models.packing import image_blocks, send
from loopitr.models.parts import FreezableParts
from loopitr.models.scoring import reranking_score

# About how many bytes the activations of the pairs that are scored at a time may take, on a CPU and on a GPU.
BLOCK_BYTES, GPU_BLOCK_BYTES = 2**28, 2**30


class LoopITRModel(FreezableParts, LoopITRPreTrainedModel):
    """A dual encoder (`.dual`) and a fusion head that scores pairs from the same backbones' tokens.

    Example:
        >>> import torch
        >>> from loopitr import LoopITRConfig, LoopITRModel
        >>> config = LoopITRConfig(
        ...     vision={"name": "test_vit", "image_size": 32},
        ...     text={"model_type": "bert", "vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2},
        ...     fusion={"num_layers": 1, "num_heads": 4},
        ... )
        >>> model = LoopITRModel(config).eval()
        >>> images = model.encode_images(torch.zeros(2, 3, 32, 32))
        >>> texts = model.encode_texts(torch.tensor([[2, 7, 3], [2, 8, 3]]))
        >>> model.score_pairs(images, texts, torch.tensor([[0, 0], [1, 0], [1, 1]])).score.shape
        torch.Size([3])
    """

    config_class = LoopITRConfig
    base_model_prefix = "loopitr"

    def __init__(self, config: LoopITRConfig) -> None:
        super().__init__(config)
        self.dual = DualEncoder(config.dual_config())
        vision, text = self.dual.vision, self.dual.text
        if config.fusion["image_positions"] is None:
            # A CNN's tokens do not say where they are.
            config.fusion["image_positions"] = vision.is_map and config.fusion["num_layers"] > 0
        self._inner_layer: int | None = None
        if config.fusion["style"] == "shared":
            self._inner_layer = len(text.layers) - config.fusion["num_layers"]
            if self._inner_layer < 0:
                count = config.fusion["num_layers"]
                raise ValueError(f"fusion.num_layers {count} is more than the text backbone's {len(text.layers)}")
            config.fusion["num_heads"] = text.model.config.num_attention_heads
            if config.fusion["first_token_id"] is not None and self._inner_layer > 0:
                count = config.fusion["num_layers"]
                raise ValueError(f"fusion.first_token_id needs all {len(text.layers)} text layers shared, got {count}")
        self.fusion = FusionEncoder(
            config, width=text.width, image_width=vision.width, num_image_tokens=vision.num_tokens
        )
        self.itm_head = nn.Linear(text.width, 2) if config.fusion["num_layers"] else None
        self.agreement: TokenAgreement | None = None
        if config.fusion["agreement"] is not None:
            self.agreement = TokenAgreement(
                text_width=text.width,
                image_width=vision.width,
                width=config.fusion["agreement"],
                dropout=config.fusion["agreement_dropout"],
            )
        self.mlm_head = MLMHead(text.model.get_input_embeddings(), text.model.config) if config.mlm_head else None
        self._frozen: set[str] = set()
        self._arrangement: Arrangement = EagerArrangement()
        self.post_init()

    # Encoding

    def encode_images(self, pixel_values: Tensor) -> ImageState:
        """`[B, 3, S, S]` -> embeds and tokens, one run of the backbone."""
        return self.image_state(self.dual.vision(pixel_values))

    def image_state(self, tokens: Tensor) -> ImageState:
        """The state of images from their backbone tokens `[B, N, D]`, such as cached ones, in any precision."""
        tokens = tokens.to(self.dual.logit_scale.dtype)
        return ImageState(embeds=self.dual.embed_image_tokens(tokens), tokens=tokens)

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextState:
        """`[T, L]` -> embeds and tokens, one run of the backbone."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        features = self.text_features(input_ids, mask)
        embeds = self.dual.embed_pooled_texts(features.pooled)
        return TextState(embeds=embeds, tokens=features.tokens, mask=mask.bool())

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """`[T, L]` -> the output of the backbone alone, which can be cached while the backbone is frozen."""
        output = self.dual.text(input_ids, attention_mask, inner_layer=self._inner_layer)
        pooled = self.dual.text.pool(output, attention_mask)  # [T, D']
        tokens = output.tokens if output.inner is None else output.inner
        first = self.config.fusion["first_token_id"]
        if first is not None:
            tokens = torch.cat([self.dual.text.embed_first(first, len(tokens)), tokens[:, 1:]], 1)  # [T, L, D]
        return TextFeatures(pooled=pooled, tokens=tokens)

    def text_state(self, features: TextFeatures, attention_mask: Tensor) -> TextState:
        """The state of texts from the backbone's output, such as a cached one, in any precision."""
        pooled, tokens = (x.to(self.dual.logit_scale.dtype) for x in (features.pooled, features.tokens))
        return TextState(embeds=self.dual.embed_pooled_texts(pooled), tokens=tokens, mask=attention_mask.bool())

    def project_images(self, state: ImageState) -> ImageState:
        """Add every fusion layer's keys and values to a state, and the regions for token agreement.

        Do this once for images that are scored with many texts.
        """
        if state.keys_values is None:
            state = replace(state, keys_values=self.fusion.project(state.tokens))
        if state.regions is None and self.agreement is not None:
            state = replace(state, regions=self.agreement.project_regions(state.tokens))
        return state

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, S, S]` -> embeds `[B, E]`, unit length."""
        return self.dual.get_image_features(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[T, L]` -> embeds `[T, E]`, unit length."""
        return self.dual.get_text_features(input_ids, attention_mask)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> DualOutput:
        """The dual head's similarities of all images with all texts; pairs are scored by `score_pairs`."""
        return self.dual(pixel_values, input_ids, attention_mask)

    # Scoring

    def score_pairs(
        self, image_state: ImageState, text_state: TextState, pairs: Tensor, *, block_size: int | None = None
    ) -> PairScores:
        """Match scores of any pairs, in any order, repeats allowed (and scored once).

        Token agreement, where the model has it, is part of them: it is added to the logit of a match.

        Args:
            pairs: `[P, 2]` int64 of (image index, text index).
            block_size: the most pairs scored at a time, all pairs of an image together where possible. This bounds the
                memory: with gradient, blocks are recomputed in the backward pass. None: as many pairs as fit into
                `BLOCK_BYTES` of activations (`GPU_BLOCK_BYTES` on a GPU), and with gradient all at once.

        Raises:
            ValueError: `pairs` has another shape or type, an index is out of range, a text has no token, or
                `block_size` is below 1.
        """
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
            raise ValueError(f"pairs must be int64 [P, 2], got {pairs.dtype} {list(pairs.shape)}")
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        unique, inverse = unique_pairs(pairs.cpu(), len(image_state.tokens), len(text_state.tokens))
        if not len(unique):
            empty = image_state.tokens.new_zeros(0, 2, dtype=torch.float32)
            return PairScores(logits=empty, score=empty[:, 0])
        if image_state.keys_values is not None:
            image_state = self.project_images(image_state)  # This adds the regions if they are missing.
        mask = text_state.mask.cpu()
        blocks = image_blocks(unique, block_size or self._block_size(image_state, mask, unique))
        recompute = block_size is not None and len(blocks) > 1 and torch.is_grad_enabled()
        score = partial(checkpoint, self._score_block, use_reentrant=False) if recompute else self._score_block
        # `checkpoint` restores dropout's random state on the device of a tensor argument, not of one in a dataclass.
        logits = torch.cat([score(image_state.tokens, image_state, text_state, mask, block) for block in blocks])
        scored = logits.index_select(0, *send([inverse], logits.device))  # [P, 2]
        return PairScores(logits=scored, score=scored[:, 1] - scored[:, 0])

    def reranking_score(self, match: Tensor, similarity: Tensor) -> Tensor:
        """The score that candidates are ranked by: match score + w x similarity / temperature, float64, any shape.

        Args:
            match: match scores, `PairScores.score`.
            similarity: dot products of the embeds of the same pairs, not divided by the temperature.
        """
        scaled = similarity.double() * self.dual.scale.detach().double()
        return reranking_score(match, scaled, self.config.similarity_weight)

    def fused_tokens(self, image_state: ImageState, text_state: TextState, pairs: Tensor) -> Tensor:
        """All fused tokens `[R, D]` of unique, sorted `pairs`, without padding, pair by pair (for the MLM head)."""
        arranged = self._arrangement.arrange(image_state, text_state.mask.cpu(), pairs.cpu())
        return self._fuse(arranged, packed_tokens(text_state, arranged), first_only=False)

    def agreement_of_all(self, image_state: ImageState, text_state: TextState) -> Tensor:
        """Token agreement `[B, T]` of every image with every text, which `score_pairs` adds to the match scores.

        Raises:
            ValueError: the model has no token agreement, or a text has no token.
        """
        if self.agreement is None:
            raise ValueError("this model has no token agreement: it was built without model.fusion.agreement")
        regions = image_state.regions
        if regions is None:
            regions = self.agreement.project_regions(image_state.tokens)  # [B, N, A]
        return full_precision(self.agreement.all_pairs(regions, text_state.tokens, text_state.mask))

    def _block_size(self, images: ImageState, mask: Tensor, pairs: Tensor) -> int:
        """The default number of pairs scored at a time; with gradient all, since their activations are kept anyway."""
        if torch.is_grad_enabled():
            return len(pairs)
        rows, used = int(mask.sum(1)[pairs[:, 1]].sum()), len(torch.unique_consecutive(pairs[:, 0]))
        projected = images.keys_values is not None
        elements = self.fusion.activation_elements(rows, used, images.tokens.shape[1], projected=projected)
        if self.agreement is not None:
            own = self.agreement.activation_elements(rows, used, images.tokens.shape[1], projected=projected)
            elements = max(elements, own)
        room = BLOCK_BYTES if images.tokens.device.type == "cpu" else GPU_BLOCK_BYTES
        return max(1, len(pairs) * room // (elements * images.tokens.element_size()))

    def _score_block(self, _: Tensor, images: ImageState, texts: TextState, mask: Tensor, pairs: Tensor) -> Tensor:
        """Pairs and mask on the CPU -> logits `[P, 2]`, in full precision so that close scores do not tie."""
        arranged = self._arrangement.arrange(images, mask, pairs)
        packed = packed_tokens(texts, arranged)
        logits = full_precision(packed.new_zeros(len(pairs), 2))
        if self.itm_head is not None:
            logits = outside_autocast(self.itm_head, self._fuse(arranged, packed, first_only=True))  # [P, 2]
        if self.agreement is None:
            return logits
        regions = arranged.regions
        if regions is None:
            assert isinstance(arranged.images, Tensor)  # `score_pairs` adds regions where there are keys and values.
            regions = self.agreement.project_regions(arranged.images)  # [I, N, A]
        agreement = full_precision(self.agreement(packed, regions, arranged.layout))  # [P]
        return logits + F.pad(agreement[:, None], (1, 0))

    def _fuse(self, arranged: FusionInput, packed: Tensor, *, first_only: bool) -> Tensor:
        shared = None if self._inner_layer is None else self.dual.text.layers[self._inner_layer :]
        return self.fusion(packed, arranged.images, arranged.layout, shared_layers=shared, first_only=first_only)

    # Parts

    def dual_encoder(self) -> DualEncoder:
        """The dual encoder alone; it shares this model's weights."""
        return self.dual

    def parts(self) -> dict[str, list[nn.Module | nn.Parameter]]:
        """Modules and parameters by the names that `freeze` and the optimiser's groups use."""
        dual = self.dual
        fusion: list[nn.Module | nn.Parameter] = [self.fusion]
        fusion += [head for head in (self.itm_head, self.agreement, self.mlm_head) if head is not None]
        dual_head: list[nn.Module | nn.Parameter] = [dual.vision_projection, dual.text_projection, dual.logit_scale]
        if dual.logit_bias is not None:
            dual_head.append(dual.logit_bias)
        return {"vision": [dual.vision], "text": [dual.text], "dual_head": dual_head, "fusion": fusion}

    def resize_images(self, image_size: int) -> None:
        """Change the image size to `image_size` pixels per side; positional embeddings are interpolated."""
        before = self.dual.vision.num_tokens
        self.dual.vision.resize(image_size)
        self.config.vision["image_size"] = self.dual.config.vision["image_size"] = image_size
        if self.dual.vision.num_tokens != before:
            self.fusion.resize_positions(self.dual.vision.num_tokens, prefix=self.dual.vision.num_prefix_tokens)
        self.freeze(tuple(self._frozen))  # Resizing may have made new parameters, which would train.
        freeze_adapted(self.dual)

    def compile_parts(self, **options: Any) -> None:
        """Compile both backbones and the fusion encoder in place with `torch.compile` and its `options`.

        Lengths are dynamic: captions are padded to the longest of the batch, and pairs are laid out in a fixed number
        of padded buckets. For the whole process, sizes that are equal by chance are not assumed to stay equal
        (`use_duck_shape`). Each kind of use has a graph of its own: training, scoring without gradient, keys and values
        given or not, MLM.
        """
        compile_in_place(self, **options)
        self._arrangement = FixedArrangement()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.dual._set_gradient_checkpointing(enable, *args, **kwargs)
        self.fusion.gradient_checkpointing = enable
