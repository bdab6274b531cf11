"""Training augmentation. Evaluation uses the transform of the model's processor instead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

LEAST_RATIO = 3 / 4  # the smallest ratio of the sides of a random crop


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator for the block only.

    `torch.manual_seed` would reseed every GPU too, and with it dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class TrainTransform:
    """PIL RGB image or uint8 tensor `[3, H, W]` -> normalised float tensor `[3, size, size]` of a random crop.

    The attribute `shortest` is the length in pixels that the shorter side of an image needs, so that no crop has to be
    enlarged.

    Args:
        image_size: the side of the crop after resizing, or (height, width).
        crop_scale: the smallest and the largest area of a crop, as fractions of the image.
        flip: mirror images at random; this makes captions wrong that say left or right.
        randaugment: apply two of ALBEF's ten operations (arXiv 2107.07651); none changes hue or saturation, since
            captions name colours.

    Raises:
        ValueError: `crop_scale` or `interpolation` is not valid.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = False,
        randaugment: bool = False,
    ) -> None:
        if not 0.0 < crop_scale[0] <= crop_scale[1] <= 1.0:
            raise ValueError(f"crop_scale must satisfy 0 < low <= high <= 1, got {crop_scale}")
        modes = {mode.value: mode for mode in InterpolationMode}
        if interpolation not in modes:
            raise ValueError(f"interpolation must be one of {', '.join(modes)}; got {interpolation!r}")
        size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        # For an image with sides m <= n, the area of a crop is at least low * m * n. Its shorter side is therefore at
        # least sqrt(3/4 * low) * m, since the ratio of its sides is at least 3/4; and at least low * m, since its
        # longer side is at most n.
        self.shortest = math.ceil(max(size) / max(crop_scale[0], math.sqrt(LEAST_RATIO * crop_scale[0])))
        resizing: dict[str, Any] = {"interpolation": modes[interpolation], "antialias": True}
        ratio = (LEAST_RATIO, 1 / LEAST_RATIO)
        is_whole = crop_scale[0] == 1  # A crop would cut a wide image to the largest ratio.
        steps: list[torch.nn.Module] = [
            v2.PILToTensor(),  # Resizing uint8 tensors is about twice as fast as Pillow's resizing.
            v2.Resize(size, **resizing)
            if is_whole
            else v2.RandomResizedCrop(size, scale=crop_scale, ratio=ratio, **resizing),
        ]
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        if randaugment:
            steps += [_one_of_albef(size), _one_of_albef(size)]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=list(mean), std=list(std))]
        self.steps = v2.Compose(steps)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        return self.steps(image)  # [3, H, W]


def _one_of_albef(size: Sequence[int]) -> v2.RandomChoice:
    """One of ALBEF's ten operations at random, with strengths of our own, near its magnitude 7 of 10.

    Brightness is 0.4 to 1.6 times the image's, and translations are at most 10 pixels.
    """
    most = 0.1  # Nor does a translation exceed this fraction of a side.
    move = (min(most, 10 / size[1]), min(most, 10 / size[0]))
    bilinear = InterpolationMode.BILINEAR
    return v2.RandomChoice(
        [
            v2.Identity(),
            v2.RandomAutocontrast(p=1.0),
            v2.RandomEqualize(p=1.0),
            v2.ColorJitter(brightness=(0.4, 1.6)),
            v2.RandomAdjustSharpness(1.6, p=1.0),
            v2.RandomAffine(degrees=0, shear=(-12.0, 12.0), interpolation=bilinear),
            v2.RandomAffine(degrees=0, shear=(0.0, 0.0, -12.0, 12.0), interpolation=bilinear),
            v2.RandomAffine(degrees=0, translate=(move[0], 0.0)),
            v2.RandomAffine(degrees=0, translate=(0.0, move[1])),
            v2.RandomRotation(21.0, interpolation=bilinear),
        ]
    )
