"""python recipes/benchmarks/step.py [--batch_size 16] [--rounds 7] [--device cuda] [--precision bf16] [--output F.json]

Measures what the loop costs. The variants of a training step (forward and backward, no optimiser) are

- ITC only; ITC + ITM;
- the loop (CPRD) with K = 4, and with K = 8, the latter also with ITM on one negative and the other scores without
  gradient;
- the loop with a padded forward pass per pair;
- ITC only and the loop with token agreement, in the scores of the candidates and as a separate loss on all pairs.

All use one model with random weights (by default ViT-S/16 at 224 px, a text backbone of MiniLM's size, 6 text + 3
fusion layers), and captions of 14 tokens on average, padded to the longest of a batch. They run interleaved in one
process. Reported are medians of seconds and of ratios to ITC only, FLOPs counted by torch.utils.flop_counter, and the
FLOP/s relative to those of a large matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from shared import (
    PRECISIONS,
    PlainPairs,
    check_options,
    interleaved,
    matmul_speed,
    random_batch,
    random_model,
)

import loopitr
from loopitr.building.options import AGREEMENT_WIDTH
from loopitr.cli import parse, run
from loopitr.evaluation.report import markdown_table
from loopitr.objective.options import ObjectiveOptions
from loopitr.training.reporting import write_json

VARIANTS = {
    "ITC only": ObjectiveOptions(itm=0.0, distillation=0.0),
    "ITC + ITM, K=4": ObjectiveOptions(distillation=0.0, num_negatives=4),
    "loop, K=4": ObjectiveOptions(num_negatives=4),
    "loop, K=8": ObjectiveOptions(num_negatives=8),
    "loop, K=8, ITM on one": ObjectiveOptions(num_negatives=8, itm_negatives=1),
    "ITC + agreement": ObjectiveOptions(itm=0.0, distillation=0.0, agreement=1.0),
    "loop, K=4, agreement": ObjectiveOptions(num_negatives=4, agreement=1.0),
}
PLAIN = ("loop, K=4", "loop, K=8")


@dataclass
class Options:
    vision: str = "vit_small_patch16_224"
    image_size: int = 224
    hidden_size: int = 384
    text_layers: int = 6
    fusion_layers: int = 3
    batch_size: int = 16
    rounds: int = 7
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    output: str | None = None
    """JSON file for the figures."""


def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    model = random_model(options, agreement=AGREEMENT_WIDTH)
    agreement = model.agreement
    inputs = random_batch(options.batch_size, image_size=options.image_size, device=options.device)
    plain = PlainPairs(model)

    def step(objective: loopitr.LoopObjective, score_pairs: Callable[..., loopitr.PairScores]) -> None:
        model.zero_grad()
        model.agreement = agreement if objective.compares_tokens else None
        model.score_pairs = score_pairs  # type: ignore[method-assign]
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"):
            loss = objective(**inputs).loss
        loss.backward()

    from loopitr.objective.build import build_objective

    calls = {name: partial(step, build_objective(model, o), model.score_pairs) for name, o in VARIANTS.items()}
    calls |= {f"{name}, plain": partial(step, build_objective(model, VARIANTS[name]), plain) for name in PLAIN}
    timed = interleaved(calls, rounds=options.rounds, device=options.device)
    speed = matmul_speed(options.device, PRECISIONS[options.precision])
    print(
        f"{options.vision} {options.image_size} px, {options.text_layers} + {options.fusion_layers} layers, "
        f"B={options.batch_size}, {options.precision}, {options.device}, {torch.get_num_threads()} threads, "
        f"matrix product {speed / 1e9:.0f} GFLOP/s"
    )
    base, figures, rows = timed["ITC only"], {}, []
    for name, timing in timed.items():
        figures[name] = {
            "seconds": timing.median,
            "ratio": timing.ratio(base),
            "flops": timing.flops,
            "flops_ratio": timing.flops / base.flops,
            "of_peak": timing.flops / timing.median / speed,
        }
        rows.append(
            [
                name,
                f"{timing.median:.3f}",
                f"{timing.ratio(base):.2f}",
                f"{timing.flops / 1e9:.1f}",
                f"{timing.flops / base.flops:.2f}",
                f"{figures[name]['of_peak']:.2f}",
            ]
        )
    print(markdown_table(["variant", "seconds", "ratio", "GFLOP", "ratio", "of peak"], rows))
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "figures": figures})


if __name__ == "__main__":
    run(main)
