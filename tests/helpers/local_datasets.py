"""Small data that `datasets` loads from the disk."""

import io

import datasets
from PIL import Image


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def make_parquet(path, rows, caption="caption"):
    image = datasets.Image()
    kind = datasets.List(datasets.Value("string")) if isinstance(rows[0][1], list) else datasets.Value("string")
    data = {"image": [row[0] for row in rows], caption: [row[1] for row in rows]}
    features = datasets.Features({"image": image, caption: kind})
    datasets.Dataset.from_dict(data, features=features).to_parquet(str(path))
    return str(path)
