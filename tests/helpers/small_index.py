"""A tiny model and an index that it has made of a few captioned images."""

from __future__ import annotations

import csv
from pathlib import Path

from helpers.support import tiny_model
from helpers.tiny_gallery import captions, jpeg, tiny_processor
from helpers.tiny_index import index

from loopitr import Searcher
from loopitr.search.sources import open_source

IMAGES = 12
QUERY = "a small red circle above a blue square"
EVIL = "</span><script>document.title='evil'</script> ${7*7} {{7*7}} `x`"


def write_small_index(folder: Path, *, with_captions: bool = True) -> Path:
    """`run/`, `photos/N.jpg`, `photos.csv` with two captions each (that of 3.jpg is markup), and their `index/`."""
    model = tiny_model().eval()
    model.config.similarity_weight = 0.02
    model.save_pretrained(folder / "run")
    tiny_processor().save_pretrained(folder / "run")
    (folder / "photos").mkdir()
    with (folder / "photos.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i in range(IMAGES):
            (folder / "photos" / f"{i}.jpg").write_bytes(jpeg(i))
            for caption in (EVIL, "x") if i == 3 else captions(i, 2):
                table.writerow([f"{i}.jpg", caption])
    source = open_source(folder / "photos.csv", folder / "photos") if with_captions else folder / "photos"
    index(source, folder / "run", folder / "index", device="cpu")
    return folder


def open_small_index(folder: Path) -> Searcher:
    return Searcher.open(folder / "index", device="cpu")
