"""python recipes/examples/own_term.py

A term of your own: what the step is trained on is a list of small objects, and any of them can be written here. This
one keeps the embeds of different images of a batch apart (uniformity, arXiv 2005.10242).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from small_model import small_model
from torch import Tensor

import loopitr
from loopitr.data import SceneRecords
from loopitr.data.images import decode_image
from loopitr.objective.step import Step


@dataclass(frozen=True)
class Uniformity(loopitr.Term):
    """log mean exp(-2 |a_i - a_j|^2) over pairs of images of the batch."""

    weight: float = 0.1
    name = "uniformity"

    def __call__(self, step: Step) -> Tensor:
        images = step.embeds.images  # [G, E] of all ranks
        return torch.pdist(images).square().mul(-2).exp().mean().log()


def main() -> None:
    torch.manual_seed(0)
    model, processor = small_model()
    terms = [loopitr.Contrastive(), loopitr.Matching(), Uniformity(0.5)]
    objective = loopitr.LoopObjective(model.train(), terms, miner=loopitr.TopK(2))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    records = SceneRecords("train", 32, image_size=32)
    for step in range(10):
        images = [decode_image(record.image, record.name) for record in records]
        texts = [record.captions[step % 4] for record in records]
        batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
        output = objective(
            pixel_values=batch["pixel_values"],
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            identities=torch.tensor([record.identity for record in records]),
            caption_ids=torch.arange(len(records)),
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        print(
            f"step {step + 1}: "
            + ", ".join(f"{name} {float(value.detach()):.3f}" for name, value in output.terms.items())
        )


if __name__ == "__main__":
    main()
