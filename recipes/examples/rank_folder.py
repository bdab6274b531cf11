"""python recipes/examples/rank_folder.py MODEL FOLDER "a red circle left of a blue square"

Rank the images of a folder for a query: the dual head finds the nearest, the cross head sorts them anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

import loopitr

RERANKED = 20
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def main() -> None:
    source, folder, query = sys.argv[1:4]
    model, processor = loopitr.load(source)
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in ENDINGS)
    images = [Image.open(path).convert("RGB") for path in paths]
    inputs = processor(images=images, text=[query], return_tensors="pt")
    with torch.inference_mode():
        encoded = model.encode_images(inputs["pixel_values"])
        text = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
        similarity = (encoded.embeds @ text.embeds.T)[:, 0]  # [images]
        nearest = similarity.topk(min(RERANKED, len(paths))).indices  # [n]
        pairs = torch.stack([nearest, torch.zeros_like(nearest)], 1)  # [n, 2] of (image, text)
        match = model.score_pairs(encoded, text, pairs).score  # [n]
    for place in match.argsort(descending=True).tolist():
        image = int(nearest[place])
        print(f"{paths[image].name}\tmatch {float(match[place]):.2f}\tsimilarity {float(similarity[image]):.3f}")


if __name__ == "__main__":
    main()
