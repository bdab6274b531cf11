"""python recipes/examples/onnx_without_loopitr.py FOLDER "a red circle" IMAGE IMAGE ...

Ranks images for a text with the export that `loopitr export RUN FOLDER --to onnx` wrote. It needs numpy, pillow,
tokenizers and onnxruntime, but neither torch nor this package. Prints reranking scores and paths, the best image first.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def pixels(path: str, config: dict) -> np.ndarray:
    """Pixels `[3, S, S]`, preprocessed as in training: upright, transparency on white, resized to a square."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = image.resize((config["size"]["width"], config["size"]["height"]), config["resample"])
    values = (np.asarray(image, np.float32) / 255 - config["image_mean"]) / config["image_std"]
    return values.transpose(2, 0, 1).astype(np.float32)


def main() -> None:
    folder, query, *paths = Path(sys.argv[1]), *sys.argv[2:]
    towers = {file.stem: onnxruntime.InferenceSession(file) for file in folder.glob("*_*.onnx")}
    preprocessing = json.loads((folder / "preprocessor_config.json").read_text())
    config = json.loads((folder / "onnx_config.json").read_text())
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(query)
    ids, mask = np.array([text.ids]), np.array([text.attention_mask])
    text_embeds, text_tokens = towers["text_tower"].run(None, {"input_ids": ids, "attention_mask": mask})
    images = np.stack([pixels(path, preprocessing) for path in paths])
    image_embeds, image_tokens = towers["image_tower"].run(None, {"pixel_values": images})
    similarity = image_embeds @ text_embeds[0]  # [images]; of many images, only the most similar would be reranked
    tokens = {"image_tokens": image_tokens, "text_tokens": text_tokens, "attention_mask": mask}
    match = towers["fusion_head"].run(None, tokens)[0][:, 0]
    score = match + config["similarity_weight"] * config["scale"] * similarity
    for place in np.argsort(-score):
        print(f"{score[place]:.4f}\t{paths[place]}")


if __name__ == "__main__":
    main()
