"""The README.md of an ONNX export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopitr.models.loop_model import LoopITRModel

from .source import Source

HEAD = """\
Exported from a `loopitr` model{what}. {graphs}.
Precisions: {precisions}. Batch size and text length are dynamic. `tokenizer.json` tokenizes texts (with padding and
truncation), `preprocessor_config.json` describes the preprocessing of images. Largest difference from torch in fp32:
{parity}.
"""
EXAMPLES = {
    "image": """
```python
import json
import numpy as np, onnxruntime
from PIL import Image

config = json.load(open("preprocessor_config.json"))
session = onnxruntime.InferenceSession("image_tower.onnx")
PICTURE
pixels = (np.asarray(image, np.float32) / 255 - config["image_mean"]) / config["image_std"]
embeds = session.run(["image_embeds"], {"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)})[0]
```
""",
    "text": """
```python
import numpy as np, onnxruntime
from tokenizers import Tokenizer

texts = Tokenizer.from_file("tokenizer.json").encode_batch(["a dog on a beach"])
inputs = {"input_ids": np.array([t.ids for t in texts]), "attention_mask": np.array([t.attention_mask for t in texts])}
embeds = onnxruntime.InferenceSession("text_tower.onnx").run(["text_embeds"], inputs)[0]
```
""",
}
FUSION = """
`fusion_head.onnx` takes the towers' `image_tokens`, `text_tokens` and the texts' `attention_mask` and gives the match
scores `[images, texts]`. Candidates are ordered by match score + {weight:.4g} x {scale:.4g} x similarity, where
similarity is the dot product of the embeds (`similarity_weight` and `scale` in `onnx_config.json`).
"""


def onnx_card(source: Source, precisions: Sequence[str], parity: dict[str, float]) -> str:
    """The body of the README.md."""
    graphs, examples = [], ""
    for kind, is_exported in (("image", source.has_images), ("text", source.has_texts)):
        if is_exported:
            graphs.append(f"`{kind}_tower.onnx` gives `{kind}_embeds` of unit length")
            examples += EXAMPLES[kind].replace("PICTURE", _picture_code(source.processor.image_processor))
    if isinstance(source.model, LoopITRModel):
        scale, weight = float(source.model.dual.scale.detach()), source.model.config.similarity_weight
        examples += FUSION.format(weight=weight, scale=scale)
    return (
        HEAD.format(
            what="" if len(graphs) == 2 else ", one tower of it",
            graphs=" and ".join(graphs),
            precisions=", ".join(["fp32", *precisions]),
            parity=", ".join(f"{name} {value:.0e}" for name, value in parity.items()),
        )
        + examples
    )


def _picture_code(images: Any) -> str:
    """Lines of code that open and resize a picture like the image processor."""
    code = ['image = Image.open("photo.jpg").convert("RGB")']
    if "shortest_edge" in (images.size or {}):
        code += [
            'shortest = config["size"]["shortest_edge"]',
            "size = [shortest * x // min(image.size) for x in image.size]",
        ]
    else:
        code.append('size = config["size"]["width"], config["size"]["height"]')
    code.append('image = image.resize(size, config["resample"])')
    if images.do_center_crop:
        code += [
            'side = config["crop_size"]["height"]',
            "left, top = (image.width - side) // 2, (image.height - side) // 2",
            "image = image.crop((left, top, left + side, top + side))",
        ]
    return "\n".join(code)
