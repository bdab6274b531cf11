"""python recipes/examples/own_records.py [--output_dir runs/own_records] [--steps 8]

Trains on a Python list of records. Each has an image, in memory here, but paths and bytes are possible too, and its
captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from loopitr import (
    DataOptions,
    FusionOptions,
    LoopObjective,
    ModelOptions,
    Record,
    TextOptions,
    Trainer,
    TrainOptions,
    VisionOptions,
    build_model,
)
from loopitr.cli import parse, run

COLOURS = ("red", "green", "blue", "yellow", "purple", "black", "white", "orange")


@dataclass
class Options:
    """The options of the example."""

    output_dir: str = "runs/own_records"
    """Run folder."""
    steps: int = 8
    """Optimiser steps."""


def flag(number: int) -> Record:
    """A record of an image with two coloured halves. Records of the same `identity` would show the same image."""
    left, right = COLOURS[number // len(COLOURS)], COLOURS[number % len(COLOURS)]
    image = Image.new("RGB", (32, 32), left)
    image.paste(right, (16, 0, 32, 32))
    captions = (f"{left} on the left and {right} on the right", f"{right} beside {left}")
    return Record(image=image, captions=captions, identity=number, name=f"{left}-{right}")


def main() -> None:
    options = parse(Options, description=__doc__)
    records = [flag(number) for number in range(len(COLOURS) ** 2)]
    train, val = [r for r in records if r.identity % 4], [r for r in records if r.identity % 4 == 0]
    words = sorted({word for record in train for caption in record.captions for word in caption.split()})
    tiny: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = build_model(
        ModelOptions(
            vision=VisionOptions("test_vit", image_size=32, pretrained=False),
            text=TextOptions("scenes", pretrained=False, max_length=16, kwargs=tiny),
            fusion=FusionOptions(num_layers=1, num_heads=2),
        ),
        vocabulary=words,
    )
    settings = TrainOptions(
        output_dir=options.output_dir, max_steps=options.steps, batch_size=8, log_every=1, tracker="none"
    )
    metrics = Trainer(LoopObjective(model), processor, train, val, settings, data=DataOptions(num_workers=0)).run()
    print(f"text to image R@1 {metrics['dual']['t2i']['r1']:.1f} over {metrics['num_images']} images")


if __name__ == "__main__":
    run(main)
