"""A saved model beside a small Karpathy file, for the recipes that use a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.support import tiny_model
from helpers.tiny_gallery import captions, jpeg, tiny_processor

IMAGES, CAPTIONS = 8, 2


def write_small_karpathy(folder: Path) -> Path:
    """`run/` a saved model, `images/` with one broken JPEG, `data.json` whose split "test" has all of them."""
    tiny_model().save_pretrained(folder / "run")
    tiny_processor().save_pretrained(folder / "run")
    (folder / "images").mkdir()
    entries = []
    for i in range(IMAGES + 1):
        data = jpeg(i)
        (folder / "images" / f"{i}.jpg").write_bytes(data if i < IMAGES else data[:200])
        sentences = [{"raw": caption} for caption in captions(i, CAPTIONS)]
        entries.append({"filename": f"{i}.jpg", "imgid": i, "split": "test", "sentences": sentences})
    entries.append({"filename": "0.jpg", "imgid": 99, "split": "train", "sentences": [{"raw": "a red circle"}]})
    (folder / "data.json").write_text(json.dumps({"images": entries}))
    return folder


def data(folder: Path, *more: Any) -> list[Any]:
    """Options that name it."""
    return ["--data.karpathy", folder / "data.json", "--data.images", folder / "images", "--device", "cpu", *more]
