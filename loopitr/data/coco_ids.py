"""COCO's own ids of images and captions, from a Karpathy file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .files import read_json
from .karpathy import relative_name
from .records import DataError


@dataclass(frozen=True)
class CocoImage:
    """The id of an image, and the ids of its captions by text; a caption that occurs twice has several, in order."""

    number: int
    captions: Mapping[str, list[int]]


def coco_images(path: str | Path, split: str) -> dict[str, CocoImage]:
    """The images of a Karpathy file's split, by the names of their records.

    Raises:
        DataError: an image has no `cocoid` or a caption no `sentid`, so the file is not COCO's.
    """
    content = read_json(path)
    images: dict[str, CocoImage] = {}
    for entry in content.get("images", ()) if isinstance(content, dict) else ():
        if entry.get("split") != split:
            continue
        captions: dict[str, list[int]] = {}
        for sentence in entry.get("sentences") or ():
            if not isinstance(sentence, dict) or not isinstance(sentence.get("sentid"), int):
                raise DataError(f"{path} is not COCO's: a caption of {entry.get('filename')} has no sentid")
            captions.setdefault(" ".join(str(sentence.get("raw")).split()), []).append(sentence["sentid"])
        if not isinstance(entry.get("cocoid"), int):
            raise DataError(f"{path} is not COCO's: {entry.get('filename')} has no cocoid")
        images[relative_name(entry)] = CocoImage(entry["cocoid"], captions)
    return images
