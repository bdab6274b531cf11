"""The README.md of a SentenceTransformer export."""

from __future__ import annotations

from .source import Source

CARD = """\
Exported from a `loopitr` model: {parts}, {embed_dim} dimensions, unit length. It loads with sentence-transformers 5.4
or later, without this package and without `trust_remote_code`.

```python
{imports}from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
{use}
```
{notes}"""
IMAGE = 'images = model.encode([Image.open("photo.jpg")])'
TEXT = 'texts = model.encode(["a dog on a beach"])'
PIL = "from PIL import Image\n"
NOTES = """
PIL images with 8 bits per channel give the same vectors as the model itself, in every mode. Stock modules
neither rotate nor scale an image, so convert these first, by the line that applies:

```python
import numpy as np
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(image)  # an EXIF orientation
image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))  # mode I;16, or I with values over 255
image = Image.fromarray((np.asarray(image) * 255 + 0.5).clip(0, 255).astype(np.uint8))  # mode F with values from 0 to 1
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))  # transparency
```

The model has transparency on white. transformers does the same since 5.21; older versions drop it, so that the last
line is needed. Of a path, sentence-transformers opens the image itself, drops its transparency, and in older versions
does not rotate it: open such an image yourself, `Image.open(path)`.
"""


def sentence_transformers_card(source: Source) -> str:
    """The body of the README.md."""
    config, use, parts = source.model.config, [], []
    if source.has_images:
        use.append(IMAGE)
        parts.append(f"images ({config.vision['name']}, {config.vision['image_size']} px)")
    if source.has_texts:
        use.append(TEXT)
        parts.append(f"texts ({config.text['model_type']})")
    if len(use) == 2:
        use.append("similarity = model.similarity(texts, images)")
    return CARD.format(
        parts=" and ".join(parts),
        embed_dim=config.embed_dim,
        imports=PIL if source.has_images else "",
        use="\n".join(use),
        notes=NOTES if source.has_images else "",
    )
