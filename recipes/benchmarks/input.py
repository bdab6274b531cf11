"""python recipes/benchmarks/input.py [--images DIR] [--num_workers 2] [--device cuda] [--output F.json]

Compares the images per second that DataLoader workers deliver with those that a training step consumes. The workers
apply the training transform to whole JPEGs, to JPEGs decoded at reduced size (data.scaled_decode), and to the cache of
decoded images (data.cache_images). The step trains the dual encoder alone (forward, backward and AdamW on random
weights), which is the cheapest step and hence the hardest to feed. `workers` is the number of workers that feed the
step, if each has a core and delivers at the measured rate.

The images are those of `--images`, or photo-like noise at 500x375 and 1600x1200. All variants run interleaved in
rounds, in one process. Reported are medians of images per second and of ratios to whole JPEGs, and for the step also
FLOPs, counted by torch.utils.flop_counter, and FLOP/s relative to those of a large matrix product. On a CPU, step and
workers are timed one after the other, whereas in a training run they share the cores.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from shared import PRECISIONS, Timing, check_options, interleaved, matmul_speed

import loopitr
from loopitr.cli import parse, run
from loopitr.data import CaptionDataset, Collator, ImageCache, Record, scene_vocabulary
from loopitr.data.loader import EpochLoader
from loopitr.evaluation.report import markdown_table
from loopitr.objective.options import ObjectiveOptions
from loopitr.training.reporting import write_json

SIZES = ((500, 375), (1600, 1200))
WHOLE, SCALED, CACHED = "whole JPEG", "scaled decode", "cached"


@dataclass
class Options:
    images: str | None = None
    """Folder of JPEGs; unset: synthetic ones of two sizes."""
    image_size: int = 224
    crop_scale_min: float = 0.5
    num_workers: int = 2
    batch_size: int = 16
    batches: int = 12
    """Batches per round, a multiple of `num_workers`."""
    rounds: int = 5
    vision: str = "vit_small_patch16_224"
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    output: str | None = None
    """JSON file for the figures."""


def write_photos(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """JPEGs of noise that is stronger at coarse scales, as in photos; they have 0.3 to 0.4 bytes per pixel."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        pixels = np.full((size[1], size[0], 3), 128.0)
        for octave in range(2, int(math.log2(max(size))) + 1):
            coarse = generator.normal(128, 32, (2**octave * size[1] // size[0] + 1, 2**octave, 3))
            image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
            pixels += (np.asarray(image.resize(size, Image.Resampling.BICUBIC)) - 128.0) * 2.5 * 0.8**octave
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def photos(options: Options, scratch: Path) -> dict[str, list[Path]]:
    """The files of each set of images, by the name of the set."""
    count = options.batches * options.batch_size
    if options.images is None:
        return {f"{w}x{h}": write_photos(scratch / f"{w}x{h}", (w, h), min(count, 64)) for w, h in SIZES}
    folder = Path(options.images)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise ValueError(f"--images {folder}: no .jpg or .jpeg file in it")
    return {folder.name: paths[:count]}


def loaders(options: Options, files: dict[str, list[Path]], scratch: Path) -> dict[str, EpochLoader]:
    """The loaders by set of images and way of reading; each yields the batches of one round."""
    from loopitr.data import TrainTransform
    from loopitr.models.processing import word_tokenizer

    transform = TrainTransform(options.image_size, (0.5,) * 3, (0.5,) * 3, crop_scale=(options.crop_scale_min, 1.0))
    caption = " ".join(scene_vocabulary()[:12])
    collator = Collator(word_tokenizer(scene_vocabulary(), max_length=32), max_length=32)
    by_variant = {}
    for name, paths in files.items():
        count = options.batches * options.batch_size
        records = [
            Record(image=paths[i % len(paths)], captions=(caption,), identity=i, name=paths[i % len(paths)].name)
            for i in range(count)
        ]
        started = time.perf_counter()
        cache = ImageCache.open_or_build(
            scratch / "cache", records=records, shortest=transform.shortest, num_workers=options.num_workers
        )
        size = sum(cache[i].numel() for i in range(count)) / count
        read = sum(path.stat().st_size for path in paths) / len(paths)
        print(
            f"{name}: JPEGs of {read / 1e3:.0f} kB, cached in {(time.perf_counter() - started) / count * 1e3:.1f} ms "
            f"and {size / 1e3:.0f} kB each, shorter side at most {transform.shortest} px"
        )
        variants: dict[str, dict[str, Any]] = {
            WHOLE: {},
            SCALED: {"shortest": transform.shortest},
            CACHED: {"images": cache},
        }
        for variant, how in variants.items():
            by_variant[f"{name}, {variant}"] = EpochLoader(
                CaptionDataset(records, transform=transform, **how),
                collator,
                batch_size=options.batch_size,
                seed=0,
                rank=0,
                num_ranks=1,
                num_workers=options.num_workers,
                pin_memory=options.device.startswith("cuda"),
            )
    return by_variant


def training_step(options: Options) -> Callable[[], None]:
    """A training step of a dual encoder whose text backbone has MiniLM's size."""
    text = {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "attention_probs_dropout_prob": 0.0,
    }
    config = loopitr.LoopITRConfig(
        vision={"name": options.vision, "image_size": options.image_size}, text=text, fusion={"num_layers": 1}
    )
    torch.manual_seed(0)
    model: Any = loopitr.LoopITRModel(config).train().to(torch.device(options.device))  # type: ignore[arg-type]
    from loopitr.objective.build import build_objective

    objective = build_objective(model, ObjectiveOptions(itm=0.0, distillation=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    size = options.batch_size
    batch = {
        "pixel_values": torch.randn(size, 3, options.image_size, options.image_size),
        "input_ids": torch.randint(1000, 30000, (size, 14)),
        "attention_mask": torch.ones(size, 14, dtype=torch.long),
        "identities": torch.arange(size),
        "caption_ids": torch.arange(size),
    }
    batch = {name: value.to(options.device) for name, value in batch.items()}

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"):
            loss = objective(**batch).loss
        loss.backward()
        optimizer.step()

    return step


def read_all(loader: EpochLoader) -> None:
    """Read all batches. As their number is a multiple of the workers', all workers start and end together."""
    for _ in loader.epoch(0):
        pass


def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    if options.batches % max(1, options.num_workers):
        raise ValueError(f"batches must be a multiple of num_workers {options.num_workers}, got {options.batches}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sources = loaders(options, photos(options, scratch), scratch)
        for loader in sources.values():
            read_all(loader)  # The workers start here, as they would inherit a FLOP counter.
        calls: dict[str, Callable[[], None]] = {name: partial(read_all, loader) for name, loader in sources.items()}
        model = f"training step of {options.vision}"
        calls[model] = training_step(options)
        timed = interleaved(calls, rounds=options.rounds, device=options.device)
        report(options, timed, model, matmul_speed(options.device, PRECISIONS[options.precision]))


def report(options: Options, timed: dict[str, Timing], model: str, speed: float) -> None:
    """Print a table of what was timed, in which `model` names the step; `speed` is a large matrix product's FLOP/s."""
    consumed = options.batch_size / timed[model].median
    figures: dict[str, dict[str, Any]] = {}
    rows = []
    for name, timing in timed.items():
        if name == model:
            of_peak = timing.flops / timing.median / speed
            figures[name] = {
                "images_per_second": consumed,
                "seconds": timing.median,
                "flops": timing.flops,
                "of_peak": of_peak,
            }
            rows.append([name, f"{consumed:.1f}", "", "", "", f"{timing.flops / 1e9:.1f}", f"{of_peak:.2f}"])
            continue
        rate = options.batches * options.batch_size / timing.median
        whole = timed[f"{name.rpartition(', ')[0]}, {WHOLE}"]
        f: dict[str, Any] = {
            "images_per_second": rate,
            "seconds": timing.median,
            "ratio": whole.ratio(timing),
            "workers_needed": math.ceil(consumed * max(1, options.num_workers) / rate),
            "bottleneck": "input" if rate < consumed else "step",
        }
        figures[name] = f
        rows.append([name, f"{rate:.1f}", f"{f['ratio']:.2f}", str(f["workers_needed"]), f["bottleneck"], "", ""])
    print(
        f"{options.image_size} px, B={options.batch_size}, {options.num_workers} workers, {options.device}, "
        f"{options.precision}, {torch.get_num_threads()} threads, matrix product {speed / 1e9:.0f} GFLOP/s"
    )
    print(markdown_table(["what", "images/s", "ratio", "workers", "bottleneck", "GFLOP", "of peak"], rows))
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "figures": figures})


if __name__ == "__main__":
    run(main)
