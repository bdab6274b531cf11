"""python recipes/examples/rank_folder.py --model RUN --images FOLDER --query "a red circle" [--rerank 8]

Ranks the images of a folder for a text. The dual encoder ranks all of them by similarity; the fusion head then reranks
the first `rerank` by match score. Prints path, similarity and match score, the best first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from loopitr import LoopITRModel, load
from loopitr.cli import parse, run

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class Options:
    """The options of the example."""

    model: str
    """Run folder or hub id."""
    images: str
    """Folder of images."""
    query: str
    """Text to rank the images for."""
    rerank: int = 8
    """Images that the fusion head scores."""


@torch.inference_mode()
def main() -> None:
    options = parse(Options, description=__doc__)
    paths = sorted(path for path in Path(options.images).iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"no images in {options.images}")
    model, processor = load(options.model)
    if not isinstance(model, LoopITRModel):
        raise ValueError(f"{options.model} has no fusion head")
    pictures = [Image.open(path) for path in paths]
    images = model.encode_images(**processor(images=pictures))
    text = model.encode_texts(**processor(text=[options.query]))
    similarity = images.embeds @ text.embeds[0]  # [number of images]
    nearest = similarity.argsort(descending=True)[: max(options.rerank, 1)]
    pairs = torch.stack([nearest, torch.zeros_like(nearest)], 1)  # (image, text): there is one text
    match = model.score_pairs(images, text, pairs).score
    for place in match.argsort(descending=True).tolist():
        image = int(nearest[place])
        print(f"{paths[image]}\t{float(similarity[image]):.4f}\t{float(match[place]):.4f}")


if __name__ == "__main__":
    run(main)
