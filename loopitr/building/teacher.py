"""Loads a frozen teacher, so that it reads the pixels and token ids that a student's processor makes."""

from __future__ import annotations

from typing import Any

import torch

from loopitr.building.folders import load_saved
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.processing import LoopITRProcessor

PROBE = "A man, and two Dogs."  # It shows special tokens, letter case and punctuation.


def load_teacher(path: str, processor: LoopITRProcessor) -> LoopITRModel:
    """A saved model with its fusion head, in float32, that scores inputs made by the `processor` of its student.

    A teacher that was trained on pixels with another mean and standard deviation first converts the student's.

    Raises:
        OSError: there is no such folder or hub id.
        ValueError: it holds only a dual encoder, or it takes shorter captions or other token ids than the student.
    """
    saved = load_saved(path, dtype=torch.float32)
    if not isinstance(saved.model, LoopITRModel):
        raise ValueError(f"{path} holds a dual encoder alone: there is no fusion head in it")
    most, longest = processor.tokenizer.model_max_length, saved.model.dual.text.max_length
    if most > longest:
        raise ValueError(f"{path} cannot teach this model: it takes {longest} tokens, and captions may have {most}")
    _check_ids(saved.processor.tokenizer, processor.tokenizer, path)
    _convert_pixels(saved.model, saved.processor.image_processor, processor.image_processor)
    return saved.model


def _check_ids(theirs: Any, ours: Any, path: str) -> None:
    words, own = ({number: word for word, number in tokenizer.get_vocab().items()} for tokenizer in (theirs, ours))
    for number in sorted(words.keys() & own.keys()):
        if words[number] != own[number]:
            raise ValueError(
                f"{path} cannot teach this model: its token {number} is {words[number]!r}, the model's {own[number]!r}"
            )
    if theirs(PROBE)["input_ids"] != ours(PROBE)["input_ids"]:
        raise ValueError(f"{path} cannot teach this model: its tokenizer splits captions into other tokens")


def _convert_pixels(model: LoopITRModel, theirs: Any, ours: Any) -> None:
    (their_mean, their_std), (our_mean, our_std) = (
        (torch.tensor(images.image_mean)[:, None, None], torch.tensor(images.image_std)[:, None, None])
        for images in (theirs, ours)
    )
    if torch.equal(their_mean, our_mean) and torch.equal(their_std, our_std):
        return
    scale, shift = our_std / their_std, (our_mean - their_mean) / their_std  # [3, 1, 1]

    def convert(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (pixels,) = given  # [B, 3, S, S]
        return (pixels * scale.to(pixels) + shift.to(pixels),)

    # A hook applies wherever the teacher sees images: in training and where it is compared with its student.
    model.dual.vision.register_forward_pre_hook(convert)
