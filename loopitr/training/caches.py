"""The caches of a run on disk: decoded images, and tokens of frozen backbones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from loopitr.building.keys import text_cache_key, token_cache_key
from loopitr.data import ImageCache, Record, TextTokenCache, TokenCache
from loopitr.data.cache_folder import make_folder
from loopitr.data.options import DataOptions
from loopitr.data.transforms import TrainTransform
from loopitr.evaluation.retrieval import evaluation_transform
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.processing import LoopITRProcessor


def check_caches(model: LoopITRModel, data: DataOptions) -> None:
    """Check that the caches that `data` asks for are possible.

    Raises:
        ValueError: a cache needs a frozen backbone or data of known length, or is of no use together with another.
    """
    for option, part, kind in (("cache_tokens", "vision", "image"), ("cache_text_tokens", "text", "text")):
        if getattr(data, option) is None:
            continue
        if part in (model.config.lora or ()):
            raise ValueError(f"data.{option} needs tokens that do not change; the {kind} backbone has LoRA adapters")
        if part not in model.frozen:
            raise ValueError(f"data.{option} needs a frozen {kind} backbone: model.freeze must name {part}")
    for option in ("cache_images", "cache_text_tokens"):
        if getattr(data, option) and data.streaming:
            raise ValueError(f"data.{option} needs data of known length: it cannot be used with data.streaming")
    if data.cached_views < 1:
        raise ValueError(f"data.cached_views must be at least 1, got {data.cached_views}")
    if data.cached_views > 1 and not data.cache_tokens:
        raise ValueError("data.cached_views needs data.cache_tokens, which is unset")
    if data.cached_views > 1 and data.streaming:
        raise ValueError("data.cached_views needs data of known length: it cannot be used with data.streaming")
    if data.cache_images and data.cache_tokens:
        raise ValueError("data.cache_images is of no use with data.cache_tokens, which reads no image in training")


class Caches:
    """Opens the caches of a run; the main process builds those that do not exist."""

    def __init__(
        self, model: LoopITRModel, processor: LoopITRProcessor, data: DataOptions, accelerator: Accelerator
    ) -> None:
        """
        Raises:
            DataError: a folder cannot be made.
        """
        self.model, self.processor, self.data, self.accelerator = model, processor, data, accelerator
        self._tokens: dict[int, TokenCache] = {}
        self._texts: dict[int, TextTokenCache] = {}
        for folder in filter(None, (data.cache_images, data.cache_tokens, data.cache_text_tokens)):
            make_folder(folder)

    def tokens(self, records: Sequence[Record]) -> TokenCache | None:
        """The image tokens of `records`; None without `data.cache_tokens`."""
        if self.data.cache_tokens is None:
            return None
        if id(records) not in self._tokens:
            key = token_cache_key(self.model, self.processor)
            self._tokens[id(records)] = self._tokens_of(records, key, evaluation_transform(self.processor))
        return self._tokens[id(records)]

    def views(self, records: Sequence[Record], transform: TrainTransform, shortest: int | None) -> list[TokenCache]:
        """The image tokens of the `data.cached_views` views of the training images; empty without `data.cache_tokens`.

        The first view is the image as in evaluation; the others are results of the random `transform`.
        """
        first = self.tokens(records)
        if first is None:
            return []
        views, data = [first], self.data
        for number in range(1, data.cached_views):
            described = [first.key, data.crop_scale_min, data.flip, data.randaugment, shortest, number]
            key = hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()
            views.append(self._tokens_of(records, key, transform, seed=number, shortest=shortest))
        return views

    def _tokens_of(
        self,
        records: Sequence[Record],
        key: str,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int | None = None,
        shortest: int | None = None,
    ) -> TokenCache:
        with self.accelerator.main_process_first():
            return TokenCache.open_or_build(
                str(self.data.cache_tokens),
                key=key,
                records=records,
                transform=transform,
                encode=self.model.dual.vision.to(self.accelerator.device).eval(),
                num_workers=self.data.num_workers,
                device=self.accelerator.device,
                progress=self.accelerator.is_main_process,
                seed=seed,
                shortest=shortest,
            )

    def texts(self, records: Sequence[Record]) -> TextTokenCache | None:
        """The tokens of all captions of `records`; None without `data.cache_text_tokens`."""
        folder = self.data.cache_text_tokens
        if folder is None:
            return None
        if id(records) not in self._texts:
            with self.accelerator.main_process_first():
                self.model.dual.text.to(self.accelerator.device).eval()
                self._texts[id(records)] = open_text_cache(
                    self.model,
                    self.processor,
                    folder,
                    records,
                    progress=self.accelerator.is_main_process,
                )
        return self._texts[id(records)]

    def images(self, records: Sequence[Record], shortest: int) -> ImageCache | None:
        """The training images, decoded and shrunk; None without `data.cache_images`."""
        if self.data.cache_images is None:
            return None
        with self.accelerator.main_process_first():
            return ImageCache.open_or_build(
                self.data.cache_images,
                records=records,
                shortest=shortest,
                num_workers=self.data.num_workers,
                progress=self.accelerator.is_main_process,
            )


def open_text_cache(
    model: LoopITRModel, processor: LoopITRProcessor, folder: str, records: Sequence[Record], *, progress: bool
) -> TextTokenCache:
    """The cache of caption tokens of `records` in `folder`, built with the model's text backbone if missing."""

    def encode(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        features = model.text_features(input_ids, attention_mask)
        return features.pooled, features.tokens

    tokenizer = processor.tokenizer
    return TextTokenCache.open_or_build(
        folder,
        key=text_cache_key(model, processor),
        records=records,
        tokenizer=tokenizer,
        max_length=min(tokenizer.model_max_length, model.dual.text.max_length),
        encode=encode,
        device=next(model.dual.text.parameters()).device,
        progress=progress,
    )
