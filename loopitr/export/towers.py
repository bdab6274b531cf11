"""Exports one tower to a folder that `AutoModel` loads if this package is imported."""

from __future__ import annotations

from pathlib import Path

from loopitr.building.card import write_export_card
from loopitr.building.folders import check_output
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor
from loopitr.models.towers import TOWERS, ImageTower, TextTower

from .reading import save_image_processor, save_tokenizer
from .source import read_source

CARD = """\
The {side} tower of a `loopitr` dual encoder ({backbone}, {parameters:.1f}M parameters). It embeds {side}s as unit
vectors of {embed_dim} dimensions, whose dot product with the vectors of the other tower is the similarity.

```python
{example}
```
"""
IMAGE_EXAMPLE = """\
from PIL import Image
from transformers import AutoImageProcessor

from loopitr import ImageTower

model = ImageTower.from_pretrained("PATH")
processor = AutoImageProcessor.from_pretrained("PATH")
images = model(**processor(images=[Image.open("photo.jpg")], return_tensors="pt"))"""
TEXT_EXAMPLE = """\
from transformers import AutoTokenizer

from loopitr import TextTower

model = TextTower.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer(["a dog on a beach"], padding=True, truncation=True, return_tensors="pt")
texts = model(inputs["input_ids"], inputs["attention_mask"])"""


def export_tower(
    model: LoopITRModel | DualEncoder | str | Path,
    output: str | Path,
    tower: str,
    *,
    processor: LoopITRProcessor | None = None,
) -> ImageTower | TextTower:
    """Save one tower, with its image processor or tokenizer and a model card; LoRA adapters are merged.

    Args:
        model: a run folder, an exported dual encoder, a hub id, or a model in memory; from a saved model, the other
            tower's weights are not read.
        tower: `image` or `text`.
        processor: needed if `model` is not a path.

    Raises:
        ValueError: the tower is unknown, the model or the content of `output` is of another kind, or the processor is
            missing.
        OSError: there is no such model, or `output` cannot be written.

    Example:
        >>> import tempfile
        >>> from loopitr import TextTower, build_model, export_tower
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> model, processor = build_model(options, vocabulary=["a", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tower = export_tower(model, folder, "text", processor=processor)
        ...     TextTower.from_pretrained(folder)(processor(text=["a dog"])["input_ids"]).shape
        torch.Size([1, 256])
    """
    if tower not in TOWERS:
        raise ValueError(f"tower must be one of {', '.join(TOWERS)}, got {tower!r}")
    folder = check_output(output, TOWERS[tower].config_class.model_type)  # type: ignore[union-attr]
    source = read_source(model, processor=processor, tower=tower)
    own = source.model
    assert isinstance(own, (ImageTower, TextTower))
    own.save_pretrained(folder)
    if tower == "image":
        save_image_processor(source, folder)
    else:
        save_tokenizer(source, folder)
    write_export_card(
        folder, _card(own, tower), title=folder.resolve().name, source=source.name, tags=[f"{tower}-encoder"]
    )
    return own


def _card(own: ImageTower | TextTower, tower: str) -> str:
    config = own.config
    vision = config.vision if tower == "image" else {}
    return CARD.format(
        side=tower,
        backbone=f"{vision['name']}, {vision['image_size']} px" if vision else config.text["model_type"],
        embed_dim=config.embed_dim,
        parameters=sum(parameter.numel() for parameter in own.parameters()) / 1e6,
        example=IMAGE_EXAMPLE if tower == "image" else TEXT_EXAMPLE,
    )
