"""python recipes/examples/own_term.py [--output_dir runs/own_term] [--steps 8] [--weight 0.1]

Adds a loss: a class of ten lines, trained for a few steps together with the package's terms on the built-in scenes.
`history.jsonl` in the run folder has it as `loss/uniformity`, and its metric as `train/closest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loopitr import (
    Contrastive,
    DataOptions,
    FusionOptions,
    LoadReport,
    LoopObjective,
    Matching,
    ModelOptions,
    Term,
    TermOutput,
    TextOptions,
    TopK,
    Trainer,
    TrainOptions,
    VisionOptions,
    build_model,
    load_records,
)
from loopitr.cli import parse, run


@dataclass
class Options:
    """The options of the example."""

    output_dir: str = "runs/own_term"
    """Run folder."""
    steps: int = 8
    """Optimiser steps."""
    weight: float = 0.1
    """Weight of the term."""


@dataclass(frozen=True)
class Uniformity(Term):
    """Spreads image embeds over the sphere: the log of the mean Gaussian potential of pairs (arXiv 2005.10242)."""

    weight: float = 1.0
    name = "uniformity"

    def __call__(self, step: Any) -> TermOutput:
        distances = torch.pdist(step.embeds.images)  # [G (G - 1) / 2], of all pairs of the G images of all ranks
        return TermOutput((-2 * distances**2).exp().mean().log(), {"closest": distances.detach().min()})


def main() -> None:
    options = parse(Options, description=__doc__)
    data = DataOptions(scenes=True, scenes_train=64, scenes_val=16, scenes_image_size=32, num_workers=0)
    records: list[Any] = [load_records(data, split, LoadReport()) for split in ("train", "val")]
    train, val = records
    words = sorted({word for record in train for caption in record.captions for word in caption.split()})
    tiny: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = build_model(
        ModelOptions(
            vision=VisionOptions("test_vit", image_size=32, pretrained=False),
            text=TextOptions("scenes", pretrained=False, max_length=32, kwargs=tiny),
            fusion=FusionOptions(num_layers=1, num_heads=2),
        ),
        vocabulary=words,
    )
    objective = LoopObjective(model, [Contrastive(), Matching(), Uniformity(options.weight)], miner=TopK(2))
    settings = TrainOptions(
        output_dir=options.output_dir, max_steps=options.steps, batch_size=8, log_every=1, tracker="none"
    )
    Trainer(objective, processor, train, val, settings, data=data).run()
    print(f"the losses are in {options.output_dir}/history.jsonl")


if __name__ == "__main__":
    run(main)
