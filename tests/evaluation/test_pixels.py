"""The fast way from an image to pixels gives what the image processor gives."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from loopitr.evaluation.pixels import _called, _resized, transform_of
from loopitr.models.processing import image_processor

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SIZES = [(500, 375), (375, 500), (32, 32), (33, 31), (1, 1), (3, 200), (1200, 20), (64, 64)]


def noise(size):
    rng = np.random.default_rng(size)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("scale", [IMAGENET, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}])
def test_pixels_are_the_processors_bit_by_bit(interpolation, scale):
    processor = image_processor(32, interpolation=interpolation, **scale)
    transform = pickle.loads(pickle.dumps(transform_of(processor)))
    assert transform.func is _resized
    for size in SIZES:
        pixels = transform(noise(size))
        assert torch.equal(pixels, processor(noise(size), return_tensors="pt")["pixel_values"][0])
        assert pixels.is_contiguous()


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, resample=1),
        CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, do_normalize=False),
        SiglipImageProcessor(size={"height": 32, "width": 32}),
    ],
)
def test_other_processors_are_called(processor):
    transform = transform_of(processor)
    assert transform.func is _called
    image = noise((50, 40))
    assert torch.equal(transform(image), processor(image, return_tensors="pt")["pixel_values"][0])


def test_a_processor_with_other_pixels_is_called(monkeypatch):
    processor = image_processor(32, interpolation="bicubic", **IMAGENET)
    monkeypatch.setattr("loopitr.evaluation.pixels.INTERPOLATIONS", {2: "bilinear", 3: "bilinear"})
    assert transform_of(processor).func is _called
