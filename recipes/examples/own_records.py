"""python recipes/examples/own_records.py [OUTPUT_DIR]

Train on records of your own: a Python list of images (paths, bytes or PIL) with their captions. No option tree, no file
formats.
"""

from __future__ import annotations

import sys

from PIL import Image
from small_model import small_model

import loopitr
from loopitr.data import DataOptions

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 214), "yellow": (236, 200, 30)}


def squares(count: int, first: int = 0) -> list[loopitr.Record]:
    """`count` images of one coloured square above another; rows of one `identity` show the same thing."""
    records = []
    for number in range(first, first + count):
        upper, lower = list(COLOURS)[number % 4], list(COLOURS)[number // 4 % 4]
        image = Image.new("RGB", (32, 32), COLOURS[upper])
        image.paste(COLOURS[lower], (0, 16, 32, 32))
        captions = (f"a {upper} square above a {lower} square", f"a {lower} square below a {upper} square")
        records.append(
            loopitr.Record(image=image, captions=captions, identity=number % 16, name=f"squares/{number}", split=None)
        )
    return records


def main() -> None:
    model, processor = small_model()
    objective = loopitr.LoopObjective(model, [loopitr.Contrastive(), loopitr.Matching(), loopitr.Ranking(0.5)])
    options = loopitr.TrainOptions(
        output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/squares",
        epochs=5,
        batch_size=16,
        backbone_lr=1e-3,
        lr=1e-3,
        checkpoint_every=0,
        tracker="none",
    )
    data = DataOptions(num_workers=0, crop_scale_min=1.0)
    trainer = loopitr.Trainer(objective, processor, squares(64), squares(16, first=64), options, data=data)
    trainer.run()  # prints the table of recalls, and writes it to output_dir


if __name__ == "__main__":
    main()
