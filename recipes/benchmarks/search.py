"""python recipes/benchmarks/search.py [--images FOLDER] [--model RUN] [--vectors 100000] [--rounds 5] [--output F.json]

Measures the three parts of a search.

- Indexing: images per second from files to the finished index, with tokens stored, against the image tower alone on
  batches in memory, interleaved, in wall and in CPU seconds.
- The dual stage: the nearest vectors of a text, found with the index and by exact search, and the part of the exact top
  100 that the index finds. The vectors are clustered, and queries lie apart from all of them, as those of texts do.
- Reranking: one text with candidates whose tokens are stored, including reading them. Beside it, the text encoder of
  transformers' BLIP scores as many pairs with as many image tokens, which it has in memory: at the size of BLIP-base,
  and with the width and the number of layers of this model's fusion head.

Without --images the images are noise; without --model weights are random, which is as fast.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shared import check_options, interleaved, random_model

import loopitr
from loopitr.cli import parse, run
from loopitr.evaluation.gallery import evaluation_transform
from loopitr.evaluation.report import markdown_table
from loopitr.search.contents import Contents
from loopitr.search.indexing import build_index
from loopitr.search.lance import LanceImages, Row
from loopitr.search.manifest import read_manifest
from loopitr.search.match_scores import match_scores
from loopitr.search.sources import folder_source
from loopitr.training.reporting import write_json

EMBED_DIM, QUERIES, TOP = 256, 50, 100


@dataclass
class Options:
    images: str | None = None
    """Folder of images to index."""
    model: str | None = None
    """Run folder."""
    count: int = 256
    """Number of images that are indexed."""
    vectors: int = 100_000
    candidates: int = 100
    batch_size: int = 8
    """Images that are encoded at a time while indexing, and by the tower alone."""
    vision: str = "vit_small_patch16_224"
    image_size: int = 224
    hidden_size: int = 384
    text_layers: int = 6
    fusion_layers: int = 2
    num_workers: int | None = None
    """Processes that open images while indexing; None: `build_index` decides."""
    rounds: int = 5
    device: str = "cpu"
    output: str | None = None
    """JSON file for the figures."""


def retriever_of(options: Options) -> loopitr.Retriever:
    if options.model is not None:
        return loopitr.Retriever.from_pretrained(options.model, device=options.device)
    from loopitr.data import scene_vocabulary
    from loopitr.models.processing import image_processor, word_tokenizer

    images = image_processor(options.image_size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    processor = loopitr.LoopITRProcessor(images, word_tokenizer(scene_vocabulary(), max_length=40))
    return loopitr.Retriever(random_model(options), processor)


def photos(options: Options, folder: Path) -> Path:
    """A folder of `count` images: links to the given ones, or JPEGs of 500 x 375 pixels."""
    folder.mkdir()
    if options.images is not None:
        for number, path in enumerate(folder_source(options.images).paths[: options.count]):
            (folder / f"{number}{Path(path).suffix}").symlink_to(path)
        return folder
    rng = np.random.default_rng(0)
    for number in range(options.count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    return folder


@torch.inference_mode()
def tower(retriever: loopitr.Retriever, pixels: torch.Tensor, count: int, batch_size: int) -> None:
    """The image tower alone on `count` images, of which `pixels` are one batch."""
    for start in range(0, count, batch_size):
        retriever.model.get_image_features(pixels[: min(batch_size, count - start)])


def indexing(options: Options, retriever: loopitr.Retriever, folder: Path) -> dict[str, Any]:
    source = photos(options, folder / "photos")
    found = folder_source(source)
    count, transform = len(found), evaluation_transform(retriever.processor)
    opened = [transform(Image.open(path).convert("RGB")) for path in found.paths[: options.batch_size]]
    pixels = torch.stack(opened).to(options.device)
    number = iter(range(10**6))

    def index() -> None:
        output = folder / f"index{next(number)}"
        build_index(
            source,
            retriever,
            output,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            show_progress=False,
        )

    calls = {"tower": partial(tower, retriever, pixels, count, options.batch_size), "index": index}
    timed = interleaved(calls, rounds=options.rounds, device=options.device)
    return {
        "images": count,
        "tower_per_second": count / timed["tower"].median,
        "per_second": count / timed["index"].median,
        "of_tower": timed["tower"].ratio(timed["index"]),
        "tower_cpu_ms_per_image": 1000 * statistics.median(timed["tower"].cpu_seconds) / count,
        "cpu_ms_per_image": 1000 * statistics.median(timed["index"].cpu_seconds) / count,
        "of_tower_cpu": timed["tower"].cpu_ratio(timed["index"]),
    }


def clustered(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors `[count, E]` in clusters of clusters, and queries `[QUERIES, E]` that lie apart from all of them."""
    coarse = rng.standard_normal((40, EMBED_DIM))
    fine = coarse[rng.integers(40, size=2000)] + rng.standard_normal((2000, EMBED_DIM))
    vectors = fine[rng.integers(2000, size=count)] + rng.standard_normal((count, EMBED_DIM))
    gap = 2 * rng.standard_normal(EMBED_DIM)  # between texts and images
    queries = vectors[rng.integers(count, size=QUERIES)] + rng.standard_normal((QUERIES, EMBED_DIM)) + gap
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (vectors, queries))  # type: ignore[return-value]


def dual_stage(options: Options, folder: Path) -> dict[str, Any]:
    vectors, queries = clustered(options.vectors, np.random.default_rng(0))
    images = LanceImages.open(folder, EMBED_DIM, create=True)
    for start in range(0, len(vectors), 10_000):
        block = vectors[start : start + 10_000]
        images.put([_row(number, vector) for number, vector in enumerate(block, start=start)])
    images.finish()
    images = LanceImages.open(folder, EMBED_DIM)
    hits = [
        len(
            {image.id for image in images.search(query, TOP)}
            & {image.id for image in images.search(query, TOP, exact=True)}
        )
        / min(TOP, len(vectors))
        for query in queries
    ]
    turns = {"index": iter(range(10**6)), "flat": iter(range(10**6))}
    calls = {name: partial(_search, images, queries, turns[name], exact=name == "flat") for name in turns}
    timed = interleaved(calls, rounds=options.rounds, device=options.device)
    return {
        "vectors": len(vectors),
        "vector_index": images.vector_index(),
        "recall_at_100": float(np.mean(hits)),
        "milliseconds": 100 * timed["index"].median,
        "flat_milliseconds": 100 * timed["flat"].median,
    }


def _search(images: LanceImages, queries: np.ndarray, turn: Any, *, exact: bool) -> None:
    for _ in range(10):
        images.search(queries[next(turn) % len(queries)], TOP, exact=exact)


def _row(number: int, vector: np.ndarray) -> Row:
    file = f"/photos/{number}.jpg"
    return Row(id=number, file=file.encode(), path=file, stamp=(1, 1), width=500, height=375, columns={}, embed=vector)


def reranking(options: Options, retriever: loopitr.Retriever, folder: Path) -> dict[str, Any]:
    index = folder / "index0"
    manifest = read_manifest(index)
    contents = Contents.open(index, manifest)
    listed = LanceImages.open(index, manifest.embed_dim).listed()
    candidates = [listed[number % len(listed)] for number in range(options.candidates)]
    text = "a small red circle left of a blue square on a white ground"
    calls: dict[str, Callable[[], Any]] = {"ours": partial(match_scores, retriever, text, candidates, contents)}
    config, vision = retriever.model.config, retriever.model.dual_encoder().vision
    width = config.text["hidden_size"]
    fused = {"width": width, "heads": config.fusion["num_heads"] or max(1, width // 64)}
    sizes = {"blip_base": {"layers": 12, "width": 768, "heads": 12, "image_width": 768}}
    if layers := len(retriever.model.fusion.cross):  # Without layers, token agreement is the whole fusion head.
        sizes["blip_our_size"] = {**fused, "layers": layers, "image_width": vision.width}
    length = len(retriever.processor(text=[text])["input_ids"][0])
    for name, size in sizes.items():
        calls[name] = partial(blip, blip_text_model(**size, device=options.device), options, vision.num_tokens, length)
    timed = interleaved(calls, rounds=options.rounds, device=options.device)
    return {"candidates": len(candidates), "image_tokens": vision.num_tokens, "text_tokens": length} | {
        **{f"{name}_seconds": timing.median for name, timing in timed.items()},
        **{f"{name}_of_ours": timed[name].ratio(timed["ours"]) for name in sizes},
        **sizes,
    }


def blip_text_model(*, layers: int, width: int, heads: int, image_width: int, device: str) -> Any:
    """transformers' BLIP text encoder with random weights."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    config = BlipTextConfig(
        hidden_size=width,
        encoder_hidden_size=image_width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return BlipTextModel(config, add_pooling_layer=False).eval().to(device)


@torch.inference_mode()
def blip(model: Any, options: Options, image_tokens: int, text_tokens: int) -> None:
    """Run BLIP's text encoder on as many pairs as there are candidates, 25 at a time."""
    at_a_time = 25
    images = torch.zeros(at_a_time, image_tokens, model.config.encoder_hidden_size, device=options.device)
    ids = torch.full((at_a_time, text_tokens), 1000, device=options.device)
    for start in range(0, options.candidates, at_a_time):
        count = min(at_a_time, options.candidates - start)
        mask = torch.ones_like(ids[:count])
        model(input_ids=ids[:count], attention_mask=mask, encoder_hidden_states=images[:count])


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    retriever = retriever_of(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {"indexing": indexing(options, retriever, folder)}
        figures["reranking"] = reranking(options, retriever, folder)
        figures["dual stage"] = dual_stage(options, folder / "vectors")
    rows = [[part, name, _shown(value)] for part, own in figures.items() for name, value in own.items()]
    print(f"{options.device}, {torch.get_num_threads()} threads")
    print(markdown_table(["what", "figure", "value"], rows))
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "figures": figures})


if __name__ == "__main__":
    run(main)
