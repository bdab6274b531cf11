"""`LoopITRProcessor`: an image processor and a tokenizer of transformers, saved with the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_utils import PILImageResampling

from loopitr.models.foreign import one_line_errors
from loopitr.models.processor_files import check_processor_files, check_words
from loopitr.rgb import below_zero, to_rgb

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor

UNLIMITED = 10**6  # tokens; the limit of a tokenizer without one is a far larger number


class LoopITRProcessor(ProcessorMixin):
    """Images -> `pixel_values`, captions -> `input_ids` and `attention_mask`.

    Example:
        >>> from PIL import Image
        >>> from loopitr import LoopITRProcessor
        >>> from loopitr.models.processing import image_processor, word_tokenizer
        >>> pixels = image_processor(32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic")
        >>> processor = LoopITRProcessor(pixels, word_tokenizer(["a", "dog"], max_length=8))
        >>> batch = processor(images=[Image.new("RGB", (40, 30))], text=["a dog", "a"])
        >>> batch["pixel_values"].shape, batch["input_ids"].shape
        (torch.Size([1, 3, 32, 32]), torch.Size([2, 4]))
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """The model's inputs for images, texts or both.

        Texts are padded on the right, and truncated to the tokenizer's `model_max_length`, unless arguments say
        otherwise. PIL images are first converted to upright 8-bit RGB, as in training (`to_rgb`); arrays and tensors
        are not.

        Raises:
            ValueError: an image cannot be read, or has pixels below 0, as after a normalisation; with
                `do_rescale=False`, arrays and tensors may have any values.
        """
        if text is not None:
            # SigLIP's tokenizers return a mask only if asked.
            returned = {"return_token_type_ids": False, "return_attention_mask": True}
            # Models pool the first token, also with tokenizers of others that would pad on the left.
            kwargs = {"padding": True, "padding_side": "right", "truncation": True, **returned, **kwargs}
            limit = self.tokenizer.model_max_length
            if kwargs["truncation"] and limit < UNLIMITED:
                # Otherwise the length in the tokenizer's own file would be used, which can differ: some have 128.
                kwargs.setdefault("max_length", limit)
        kwargs.setdefault("return_tensors", "pt")
        return super().__call__(images=_upright(images, kwargs.get("do_rescale") is not False), text=text, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the processor of a folder or hub id.

        Raises:
            OSError: a file is missing.
            ValueError: a file is damaged, or the tokenizer has no words or no padding token.
        """
        source = str(pretrained_model_name_or_path)
        folder = Path(source, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_processor_files(folder)
        kwargs.setdefault("trust_remote_code", False)  # Unset, transformers would ask on the terminal.
        with one_line_errors(f"the processor of {source}"):
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        check_words(processor.tokenizer, source)
        return processor

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save image processor and tokenizer, with `model_max_length` in every file that holds a limit."""
        limit_length(self.tokenizer, self.tokenizer.model_max_length)
        return super().save_pretrained(save_directory, *args, **kwargs)


def limit_length(tokenizer: Any, max_length: int) -> None:
    """Make a tokenizer cut texts at `max_length` tokens, in place of the limit that it was saved with.

    Raises:
        ValueError: beside the tokenizer's own tokens there would be no place for a word.
    """
    own = tokenizer.num_special_tokens_to_add()
    if max_length <= own:
        raise ValueError(f"a max_length of {max_length} leaves no place for a word: the tokenizer itself adds {own}")
    tokenizer.model_max_length = max_length
    for name in ("max_length", "stride", "truncation_strategy"):
        tokenizer.init_kwargs.pop(name, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and max_length < UNLIMITED:
        backend.no_padding()
        backend.enable_truncation(max_length, direction=tokenizer.truncation_side)


def _upright(images: Any, rescaled: bool, name: str = "the image") -> Any:
    if isinstance(images, (list, tuple)):
        return [_upright(image, rescaled, f"image {index}") for index, image in enumerate(images)]
    try:
        if isinstance(images, Image.Image):
            return to_rgb(images)
        if rescaled and isinstance(images, (np.ndarray, Tensor)) and 0 not in images.shape and images.min() < 0:
            raise below_zero(float(images.min()), float(images.max()))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return images


def image_processor(
    image_size: int, *, mean: tuple[float, ...], std: tuple[float, ...], interpolation: str
) -> CLIPImageProcessor:
    """An image processor that resizes the whole image to a square, as in the evaluation of ALBEF and BLIP.

    It does not crop, since captions describe the borders too.

    Raises:
        ValueError: Pillow has no such interpolation.
    """
    from transformers import CLIPImageProcessor

    resample = getattr(PILImageResampling, interpolation.upper(), None)
    if resample is None:
        raise ValueError(f"unknown interpolation {interpolation!r}, wanted bicubic, bilinear, nearest or lanczos")
    size = {"height": image_size, "width": image_size}
    return CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, resample=resample, image_mean=list(mean), image_std=list(std)
    )


def set_image_size(images: Any, image_size: int) -> None:
    """Change the output size of an image processor; whether it crops does not change."""
    square = {"height": image_size, "width": image_size}
    images.size = {"shortest_edge": image_size} if images.size.get("shortest_edge") else square
    if images.crop_size is not None:
        images.crop_size = square


def interpolation_of(images: Any) -> str:
    """The interpolation of an image processor, by torchvision's name; bicubic if torchvision lacks it for tensors."""
    name = "bilinear" if images.resample is None else PILImageResampling(images.resample).name.lower()
    return name if name in ("nearest", "bilinear", "bicubic") else "bicubic"


def word_tokenizer(words: list[str], *, max_length: int) -> PreTrainedTokenizerBase:
    """A word-level tokenizer with BERT's special tokens, for data with a closed vocabulary (`scenes`)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*special, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
