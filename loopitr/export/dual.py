"""The dual head leaves the network: a folder that `DualEncoder.from_pretrained` and `AutoProcessor` load."""

from __future__ import annotations

from pathlib import Path

from loopitr.building.folders import check_output, load_saved
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor

CARD = """\
---
library_name: loopitr
tags:
- loopitr
- image-text-retrieval
- dual-encoder
- feature-extraction
---

# Image-text dual encoder

The dual head of a `loopitr` model: embeds images ({vision}, {image_size} px) and
captions ({text}) into {embed_dim} dimensions, unit length; their dot product is the similarity. {parameters:.1f}M
parameters; the fusion head that it was trained with is not in here.

```python
import torch
from PIL import Image
from transformers import AutoProcessor

from loopitr import DualEncoder

model = DualEncoder.from_pretrained("PATH")
processor = AutoProcessor.from_pretrained("PATH")
inputs = processor(images=[Image.open("photo.jpg")], text=["a dog on a beach"])
with torch.inference_mode():
    images = model.get_image_features(inputs["pixel_values"])
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
similarity = images @ texts.T
```
"""


def export_dual(
    model: LoopITRModel | str | Path, output: str | Path, *, processor: LoopITRProcessor | None = None
) -> DualEncoder:
    """Write the dual encoder of a model, or of a run folder or hub id, with processor and model card; LoRA merged.

    Args:
        processor: needed where `model` is not a path.

    Raises:
        ValueError: no fusion model there, no processor, or `output` holds a model of another kind.
        OSError: no such model, or `output` cannot be written.

    Example:
        >>> import tempfile
        >>> from loopitr import DualEncoder, build_model, export_dual
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> model, processor = build_model(options, vocabulary=["a", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dual = export_dual(model, folder, processor=processor)
        ...     DualEncoder.from_pretrained(folder).config.model_type
        'loopitr_dual'
    """
    folder = check_output(output, DualEncoder.config_class.model_type)
    if isinstance(model, LoopITRModel):
        loop, source = model, "the model"
    else:
        saved = load_saved(model)
        if not isinstance(saved.model, LoopITRModel):
            raise ValueError(f"{model} is a dual encoder already")
        loop, processor, source = saved.model, processor or saved.processor, str(model)
    if processor is None:
        raise ValueError(f"{source} needs its processor to be exported with it, got None")
    dual = loop.dual_encoder()
    if dual.config.lora:
        dual = dual.merge_lora()
    dual.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(_card(dual), encoding="utf-8")
    return dual


def _card(dual: DualEncoder) -> str:
    config = dual.config
    return CARD.format(
        vision=config.vision["name"],
        image_size=config.vision["image_size"],
        text=config.text["model_type"],
        embed_dim=config.embed_dim,
        parameters=sum(parameter.numel() for parameter in dual.parameters()) / 1e6,
    )
