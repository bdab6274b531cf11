"""Draws the built-in scenes: two flat shapes on a light background, placed so that their relation is always clear."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

RGB = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 214),
    "yellow": (236, 200, 30),
    "purple": (140, 50, 170),
    "black": (28, 28, 28),
}
RADIUS = {"small": (0.085, 0.105), "large": (0.165, 0.19)}  # fractions of the image side
OVERSAMPLING = 2


def render(
    objects: Sequence[tuple[str, str, str]], *, vertical: bool, image_size: int, rng: random.Random
) -> Image.Image:
    """A picture of two objects (size, colour, shape), the first left of the second, or above it if `vertical`.

    The centres are at least 0.38 of the image side apart along the axis of the relation, and at most 0.16 across it. So
    the relation is always clear, and shapes never overlap or leave the image.
    """
    side = image_size * OVERSAMPLING
    base = rng.randint(228, 246)
    background = tuple(base + rng.randint(-8, 8) for _ in range(3))
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    shift_along, shift_across = rng.uniform(-0.03, 0.03), rng.uniform(-0.12, 0.12)
    for (size, colour, shape), centre in zip(objects, (0.27, 0.73)):
        along = centre + shift_along + rng.uniform(-0.04, 0.04)
        across = 0.5 + shift_across + rng.uniform(-0.08, 0.08)
        x, y = (across, along) if vertical else (along, across)
        fill = tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in RGB[colour])
        _draw_shape(draw, shape, x * side, y * side, rng.uniform(*RADIUS[size]) * side, fill, background)
    return image.reduce(OVERSAMPLING)


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    x: float,
    y: float,
    r: float,
    fill: tuple[int, ...],
    background: tuple[int, ...],
) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        inner = 0.55 * r
        draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=background)
    elif shape == "square":
        half = 0.88 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=fill)
    elif shape == "cross":
        arm = 0.34 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")
