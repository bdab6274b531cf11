"""python recipes/benchmarks/evaluate.py [--device cuda] [--precision bf16] [--part 0.02] [--output F.json]

Measures an evaluation at the size of COCO 5K: 5,000 images and 25,000 captions, the best 256 candidates of both
directions reranked, with the code that recipes/evaluate.py runs. Weights are random (ViT-B/16 at 384 px, 6 text + 6
fusion layers by default), as are the images and the captions of 14 tokens on average.

All embeds are drawn at random, each caption's near its image's, and are ranked at full size. Only the given part of the
images (`--part`) is encoded, including resizing in workers, with the captions that they are compared with, and only
their pairs are scored; the rest is extrapolated in proportion. A baseline runs interleaved on a few of the same pairs:
a padded batch of 35 tokens per caption, in which keys and values are projected for every pair. FLOPs are counted by
torch.utils.flop_counter (those of scoring on the first image's pairs) and compared with the speed of a large matrix
product.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from shared import (
    PRECISIONS,
    PlainPairs,
    check_options,
    interleaved,
    matmul_speed,
    peak_memory,
    random_model,
    seconds_of,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import loopitr
from loopitr.cli import parse, run
from loopitr.data import LazyRecords, Record
from loopitr.evaluation.report import markdown_table
from loopitr.training.reporting import write_json

LENGTH = 35
WORDS = [f"word{index}" for index in range(1000)]


@dataclass
class Options:
    images: int = 5000
    captions_per_image: int = 5
    k: int = 256
    part: float = 0.02
    """The part of the images that is encoded and scored."""
    vision: str = "vit_base_patch16_384"
    image_size: int = 384
    hidden_size: int = 768
    """The width of text backbone and fusion head."""
    text_layers: int = 6
    fusion_layers: int = 6
    batch_size: int = 64
    image_block: int = 32
    pair_block: int = 1024
    num_workers: int = 2
    token_storage: Literal["auto", "memory", "disk", "recompute"] = "auto"
    token_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    plain_pairs: int = 32
    rounds: int = 3
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    """The precision of autocast; fp32: none."""
    output: str | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1:
            raise ValueError(f"part must be above 0 and at most 1, got {self.part}")


class Pictures(LazyRecords):
    """Images of noise, 640 x 480 pixels as is usual in COCO."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> Record:
        pixels = np.random.default_rng(index).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        return Record(image=Image.fromarray(pixels), captions=(), identity=index, name=self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return ()

    def identity(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        return f"picture {index}"


def build(options: Options) -> loopitr.LoopITRModel:
    return random_model(options, head_width=64).eval()


def embeds(options: Options) -> list[Tensor]:
    """Image embeds `[I, E]`, caption embeds `[T, E]` (the image's embed plus equally strong noise), and identities."""
    generator = torch.Generator().manual_seed(1)
    owner = torch.arange(options.images).repeat_interleave(options.captions_per_image)  # [T]
    images = F.normalize(torch.randn(options.images, 256, generator=generator), dim=1)
    texts = F.normalize(images[owner] + F.normalize(torch.randn(len(owner), 256, generator=generator), dim=1), dim=1)
    return [x.to(options.device) for x in (images, texts, torch.arange(options.images), owner)]


class Evaluation:
    """The steps of `evaluate_retrieval`, one by one, on the first images."""

    def __init__(self, options: Options, count: int) -> None:
        from loopitr.evaluation.gallery import evaluation_transform
        from loopitr.evaluation.image_tokens import ImageTokens
        from loopitr.evaluation.storage import TokenStorage
        from loopitr.evaluation.text_tokens import TextTokens
        from loopitr.models.processing import image_processor, word_tokenizer

        self.options, self.model = options, build(options)
        processor = loopitr.LoopITRProcessor(
            image_processor(options.image_size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic"),
            word_tokenizer(WORDS, max_length=LENGTH),
        )
        words = random.Random(2)
        total = options.images * options.captions_per_image
        captions = [" ".join(words.choices(WORDS, k=words.randint(6, 18))) for _ in range(total)]  # and [CLS], [SEP]
        storage = TokenStorage(options.token_storage, options.token_dtype)
        self.positions, self.storage = list(range(count)), storage
        self.images = ImageTokens(
            self.model.dual_encoder(),
            Pictures(count),
            evaluation_transform(processor),
            cache=None,
            batch_size=min(options.batch_size, options.image_block),
            num_workers=options.num_workers,
        )
        self.texts = TextTokens(self.model, processor, captions, batch_size=options.batch_size, storage=storage)
        self.texts.embeds = torch.zeros(total, 1, device=options.device)  # Match scores do not depend on them.

    def encode_images(self) -> None:
        self.images.encode(self.positions, storage=self.storage, progress=True)

    def encode_texts(self, which: Tensor) -> None:
        self.texts.encode(which, progress=True)

    def score(self, pairs: Tensor, positions: list[int], *, progress: bool = False) -> Tensor:
        from loopitr.evaluation.reranking import score_candidates

        blocks = self.images.blocks(positions, self.options.image_block)
        block = self.options.pair_block
        return score_candidates(self.model, blocks, self.texts, pairs, pair_block=block, progress=progress)


def against_plain(evaluation: Evaluation, pairs: Tensor, options: Options) -> dict[str, float]:
    """Times all pairs of the first image with our code, and a few with the baseline; pairs/s and FLOPs per pair."""
    pairs = pairs[pairs[:, 0] == 0]
    few = pairs[: options.plain_pairs]
    (image,) = evaluation.images.blocks([0], 1)  # [1, N, D]
    texts = evaluation.texts.state(few[:, 1])
    pad = LENGTH - texts.mask.shape[1]
    tokens, mask = F.pad(texts.tokens, (0, 0, 0, pad)), F.pad(texts.mask, (0, pad)).to(options.device)
    plain = PlainPairs(evaluation.model)
    calls = {
        "plain": lambda: plain.logits(image.float().expand(len(few), -1, -1), tokens, mask).float(),
        "ours": lambda: evaluation.score(pairs, [0]),
    }
    logits = calls["plain"]()
    difference = (logits[:, 1] - logits[:, 0]).cpu() - calls["ours"]()[: len(few)]
    timed = interleaved(calls, rounds=options.rounds, device=options.device)
    return {
        "plain_pairs_per_second": len(few) / timed["plain"].median,
        "ratio": timed["plain"].ratio(timed["ours"]) * len(pairs) / len(few),
        "plain_flops_per_pair": timed["plain"].flops / len(few),
        "flops_per_pair": timed["ours"].flops / len(pairs),
        "difference": difference.abs().max().item(),
    }


def measure(options: Options) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The figures of each part by name, and those of the whole evaluation."""
    device, total = options.device, options.images * options.captions_per_image
    count = max(1, round(options.part * options.images))
    evaluation = Evaluation(options, count)
    from loopitr.evaluation.nearest import nearest
    from loopitr.evaluation.reranking import candidate_pairs

    ranked, candidates = embeds(options), list[Tensor]()
    with FlopCounterMode(display=False) as ranking:
        rank_seconds = seconds_of(lambda: candidates.append(candidate_pairs(nearest(*ranked, k=options.k))), device)
    pairs = candidates[0]
    scored = pairs[pairs[:, 0] < count]
    used = scored[:, 1].unique()
    some = used[: options.batch_size]
    with FlopCounterMode(display=False) as vision:  # also the warm-up
        size = options.image_size
        evaluation.model.dual.vision(torch.zeros(1, 3, size, size, device=device))
    with FlopCounterMode(display=False) as text:
        evaluation.encode_texts(some)
    image_seconds = seconds_of(evaluation.encode_images, device)
    text_seconds = seconds_of(partial(evaluation.encode_texts, used), device)
    plain = against_plain(evaluation, scored, options)
    score_seconds = seconds_of(partial(evaluation.score, scored, evaluation.positions, progress=True), device)
    tokens = evaluation.texts.lengths
    text_flops = text.get_total_flops() / int(tokens[some].sum())  # of one token
    figures: dict[str, dict[str, Any]] = {
        "encode images": {
            "seconds": image_seconds,
            "done": count,
            "of": options.images,
            "flops": vision.get_total_flops() * count,
        },
        "encode captions": {
            "seconds": text_seconds,
            "done": len(used),
            "of": total,
            "flops": text_flops * int(tokens[used].sum()),
        },
        "rank": {
            "seconds": rank_seconds,
            "done": options.images * total,
            "of": options.images * total,
            "flops": ranking.get_total_flops(),
        },
        "score": {
            "seconds": score_seconds,
            "done": len(scored),
            "of": len(pairs),
            "flops": plain["flops_per_pair"] * len(scored),
            "pairs_per_second": len(scored) / score_seconds,
            **plain,
        },
    }
    speed = matmul_speed(device, PRECISIONS[options.precision])
    for figure in figures.values():
        figure["whole_seconds"] = figure["seconds"] * figure["of"] / figure["done"]
        figure["of_peak"] = figure["flops"] / figure["seconds"] / speed
    whole = sum(figure["whole_seconds"] for figure in figures.values())
    return figures, {"seconds": whole, "peak_memory": peak_memory(device), "matmul_flops": speed}


@torch.inference_mode()
def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"):
        figures, whole = measure(options)
    print(
        f"{options.images} images, {options.images * options.captions_per_image} captions, k={options.k}; "
        f"{options.vision} {options.image_size} px, {options.text_layers} + {options.fusion_layers} layers, "
        f"{options.precision}, {options.device}, {torch.get_num_threads()} threads, "
        f"matrix product {whole['matmul_flops'] / 1e9:.0f} GFLOP/s"
    )
    rows = [
        [
            name,
            f"{f['seconds']:.1f}",
            f"{f['done']} of {f['of']}",
            f"{f['whole_seconds']:.1f}",
            f"{f['flops'] / f['seconds'] / 1e9:.0f}",
            f"{f['of_peak']:.2f}",
        ]
        for name, f in figures.items()
    ]
    rows.append(["whole evaluation", "", "", f"{whole['seconds']:.1f}", "", ""])
    print(markdown_table(["step", "seconds", "measured on", "extrapolated s", "GFLOP/s", "of peak"], rows))
    score = figures["score"]
    print(
        f"scoring: {score['pairs_per_second']:.1f} pairs/s; the baseline {score['plain_pairs_per_second']:.1f}, "
        f"{score['plain_flops_per_pair'] / score['flops_per_pair']:.2f} times the FLOPs; ours is "
        f"{score['ratio']:.2f} times as fast side by side, scores differ by {score['difference']:.1e}"
    )
    memory = "allocated on the GPU" if options.device.startswith("cuda") else "resident, mapped files included"
    print(f"peak memory: {whole['peak_memory'] / 2**30:.2f} GiB {memory}")
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "figures": figures, "whole": whole})


if __name__ == "__main__":
    run(main)
