"""Training augmentation; the evaluation transform belongs to the model's processor and is handed in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

LEAST_RATIO = 3 / 4  # The sides of a random crop have at least this ratio.


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator for the block only.

    `torch.manual_seed` would reseed every GPU too, and with it dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class TrainTransform:
    """PIL RGB or uint8 tensor [3, H, W] -> normalised float tensor [3, size, size] of a random crop.

    `shortest` is how many pixels the shorter side of an image needs so that no crop of it is enlarged.

    `flip` is off by default, since it makes captions that say left or right wrong. `randaugment` applies two of
    ALBEF's ten operations (arXiv 2107.07651), which leave colours alone because captions name them.
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
        # Of an image with sides m <= n, a crop's area is at least low * m * n and its ratio of sides at least 3/4, so
        # its shorter side is at least sqrt(3/4 * low) * m; nor is it below low * m, the other being at most n.
        self.shortest = math.ceil(max(size) / max(crop_scale[0], math.sqrt(LEAST_RATIO * crop_scale[0])))
        steps: list[torch.nn.Module] = [
            v2.PILToTensor(),  # It stays uint8, since resizing tensors is about twice as fast as Pillow's resizing.
            v2.RandomResizedCrop(
                size,
                scale=crop_scale,
                ratio=(LEAST_RATIO, 1 / LEAST_RATIO),
                interpolation=modes[interpolation],
                antialias=True,
            ),
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
    """One of ALBEF's ten operations at random, at its magnitude 7 of 10; it moves an image by 10 pixels at most."""
    share = 0.1  # Nor is an image moved by more than this part of its side.
    move = (min(share, 10 / size[1]), min(share, 10 / size[0]))
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
