"""python recipes/benchmarks/grad_cache.py [--batch_size 1024] [--chunk_size 64] [--device cuda] [--output F.json]

Measures peak memory and time of one step (forward and backward, no optimiser): a plain one on a batch of `chunk_size`,
and one on a batch of `batch_size` in chunks (GradCache), with ITC alone or with the loop (`--loop true`; K = 4, CPRD).
Weights are random; by default ViT-S/16 at 224 px and a text backbone of MiniLM's size with 3 fusion layers. Each step
runs in its own process. On the CPU, memory is that of the process minus what model, batch and libraries need before the
step; on a GPU, it is what torch allocated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from shared import check_options, peak_memory, random_batch, random_model, seconds_of

import loopitr
from loopitr.cli import parse, run
from loopitr.evaluation.report import markdown_table
from loopitr.objective.options import ObjectiveOptions
from loopitr.training.reporting import write_json


@dataclass
class Options:
    vision: str = "vit_small_patch16_224"
    image_size: int = 224
    hidden_size: int = 384
    text_layers: int = 6
    fusion_layers: int = 3
    batch_size: int = 1024
    chunk_size: int = 64
    loop: bool = False
    """Train matching and distillation too."""
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    only: Literal["plain", "in chunks"] | None = None
    """Measure one side, in this process, and print its figures as JSON."""
    output: str | None = None
    """JSON file for the figures."""


def build(options: Options) -> loopitr.LoopObjective:
    model = random_model(options)
    weights = {} if options.loop else {"itm": 0.0, "distillation": 0.0}
    chosen = ObjectiveOptions(num_negatives=4, **weights)  # type: ignore[arg-type]
    from loopitr.objective.build import build_objective

    return build_objective(model, chosen, pair_block=options.chunk_size * 9)


def measure(options: Options, side: str) -> dict[str, float]:
    objective, cuda = build(options), options.device.startswith("cuda")
    size = options.chunk_size if side == "plain" else options.batch_size
    batch = random_batch(size, image_size=options.image_size, device=options.device)

    from loopitr.objective.grad_cache import cached_backward

    def autocast() -> torch.autocast:
        return torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16")

    def step() -> None:
        if side == "plain":
            objective.pair_block = None
            with autocast():
                loss = objective(**batch).loss
            loss.backward()
        else:
            cached_backward(objective, batch, chunk_size=options.chunk_size, autocast=autocast)

    before = torch.cuda.memory_allocated(options.device) if cuda else peak_memory(options.device)
    seconds = seconds_of(step, options.device)
    peak = peak_memory(options.device)
    gib = 2**30
    return {
        "pairs": size,
        "seconds": seconds,
        "pairs_per_second": size / seconds,
        "step_gib": (peak - before) / gib,
        "inputs_gib": sum(x.numel() * x.element_size() for x in batch.values()) / gib,
        "peak_gib": peak / gib,
    }


def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    if options.only is not None:
        print(json.dumps(measure(options, options.only)))
        return
    figures = {}
    for side in ("plain", "in chunks"):
        command = [sys.executable, *sys.argv, "--only", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        figures[side] = json.loads(done.stdout.splitlines()[-1])
    for side in figures.values():
        # The memory of a step that fits into what building the model has freed cannot be measured.
        side["memory_ratio"] = side["step_gib"] / (figures["plain"]["step_gib"] or float("nan"))
    print(
        f"{options.vision} {options.image_size} px, {'the loop, K=4' if options.loop else 'ITC only'}, "
        f"{options.precision}, {options.device}, {torch.get_num_threads()} threads"
    )
    titles = {
        "pairs": "",
        "seconds": ".1f",
        "pairs_per_second": ".1f",
        "step_gib": ".2f",
        "memory_ratio": ".2f",
        "inputs_gib": ".2f",
        "peak_gib": ".2f",
    }
    rows = [[name, *(format(f[title], form) for title, form in titles.items())] for name, f in figures.items()]
    print(markdown_table(["step", *titles], rows))
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "figures": figures})


if __name__ == "__main__":
    run(main)
