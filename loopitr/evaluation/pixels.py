"""The pixels that a model's image processor makes of an image, without most of what a call of a processor costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

Transform = Callable[[Image.Image], Tensor]
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by Pillow's number
LARGEST_SIDE = 2048  # pixels of an image of noise; for larger ones the time of a call hardly counts


def transform_of(image_processor: Any) -> Transform:
    """A function RGB image -> `[3, S, S]` that gives exactly the processor's pixels; workers can be sent it.

    What only resizes and normalises is done here in half the time: the channels of a large image are not moved apart,
    and no options are checked again for each image. Whether the pixels are the processor's, bit by bit, is compared on
    noise first; if they are not, the processor itself is called.
    """
    from transformers import CLIPImageProcessor

    called: Transform = partial(_called, image_processor)
    if type(image_processor) is not CLIPImageProcessor or not _only_resizes(image_processor):
        return called
    size, factor = image_processor.size, 1 / image_processor.rescale_factor
    mean = torch.tensor(image_processor.image_mean)[:, None, None] * factor
    std = torch.tensor(image_processor.image_std)[:, None, None] * factor
    mode = INTERPOLATIONS[int(image_processor.resample)]
    resized: Transform = partial(_resized, (size["height"], size["width"]), mode, mean, std)
    return resized if all(torch.equal(resized(noise), called(noise)) for noise in _noise(size["height"])) else called


def _called(image_processor: Any, image: Image.Image) -> Tensor:
    return image_processor(image, return_tensors="pt")["pixel_values"][0]  # [3, S, S]


def _resized(size: tuple[int, int], mode: str, mean: Tensor, std: Tensor, image: Image.Image) -> Tensor:
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]
    small = interpolate(values[None], size=size, mode=mode, antialias=True)[0]  # [3, S, S]
    return small.float().sub_(mean).div_(std).contiguous()


def _only_resizes(image_processor: Any) -> bool:
    own = image_processor
    steps = (own.do_resize, own.do_rescale, own.rescale_factor, own.do_normalize)
    others = (own.do_center_crop, getattr(own, "do_pad", None))
    sizes = {name for name, value in dict(own.size).items() if value}
    colours = all(isinstance(x, (list, tuple)) and len(x) == 3 for x in (own.image_mean, own.image_std))
    known = sizes == {"height", "width"} and own.size["height"] <= LARGEST_SIDE and own.resample in INTERPOLATIONS
    return all(steps) and not any(others) and colours and known


def _noise(side: int) -> list[Image.Image]:
    """An image that is larger than `side` and one that is smaller, neither of them square."""
    rng = np.random.default_rng(0)
    shapes = ((side + 37, side + 64, 3), (side // 2 + 1, side // 3 + 1, 3))
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
