"""python recipes/benchmarks/step.py [--batch_size 16] [--rounds 7] [--device cuda] [--precision bf16] [--output F.json]

What the loop costs: one training step (forward and backward, no optimiser) of ITC only, ITC + ITM, and the loop with
K = 4 and 8 (CPRD), on one model with random weights (ViT-S/16 at 224 px, MiniLM-like text, 6 text + 3 fusion layers by
default) and captions of 14 tokens on average in batches padded to their longest. All variants run interleaved in one
process; medians of seconds and of ratios to ITC only. FLOPs are counted with torch.utils.flop_counter.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from loopitr import LoopITRConfig, LoopITRModel
from loopitr.cli import parse, run
from loopitr.objective import LoopObjective, ObjectiveOptions
from loopitr.reporting import write_json

VARIANTS = {
    "ITC only": ObjectiveOptions(itm=0.0, distillation=0.0),
    "ITC + ITM, K=4": ObjectiveOptions(distillation=0.0, num_negatives=4),
    "loop, K=4": ObjectiveOptions(num_negatives=4),
    "loop, K=8": ObjectiveOptions(num_negatives=8),
}


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


def build(options: Options) -> LoopITRModel:
    width, heads = options.hidden_size, options.hidden_size // 32
    text = {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": options.text_layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "attention_probs_dropout_prob": 0.0,
    }
    config = LoopITRConfig(
        vision={"name": options.vision, "image_size": options.image_size},
        text=text,
        vision_pooling="first",
        fusion={"style": "late", "num_layers": options.fusion_layers, "num_heads": heads},
    )
    torch.manual_seed(0)
    model = LoopITRModel(config).train()
    model.to(torch.device(options.device))  # type: ignore[arg-type]
    return model


def batch(options: Options) -> dict[str, torch.Tensor]:
    size, generator = options.batch_size, torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 21, (size,), generator=generator)  # 14 on average
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    inputs = {
        "pixel_values": torch.randn(size, 3, options.image_size, options.image_size, generator=generator),
        "input_ids": torch.randint(1000, 30000, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "identities": torch.arange(size),
        "caption_ids": torch.arange(size),
    }
    return {name: value.to(options.device) for name, value in inputs.items()}


def main() -> None:
    options = parse(Options, description=__doc__)
    model, inputs = build(options), batch(options)
    objectives = {name: LoopObjective(model, variant) for name, variant in VARIANTS.items()}
    cuda = options.device.startswith("cuda")

    def step(name: str) -> None:
        model.zero_grad()
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.precision == "bf16"):
            loss = objectives[name](**inputs).loss
        loss.backward()
        if cuda:
            torch.cuda.synchronize()

    flops = {}
    for name in VARIANTS:  # also the warm-up
        with FlopCounterMode(display=False) as counter:
            step(name)
        flops[name] = counter.get_total_flops()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name in VARIANTS:
            started = time.perf_counter()
            step(name)
            seconds[name].append(time.perf_counter() - started)

    base = "ITC only"
    figures = {}
    print(f"{options.vision} {options.image_size} px, {options.text_layers} + {options.fusion_layers} layers, "
          f"B={options.batch_size}, {options.precision}, {options.device}, {torch.get_num_threads()} threads")
    print(f"{'variant':<16} {'seconds':>8} {'ratio':>6} {'GFLOP':>8} {'ratio':>6} {'GFLOP/s':>8}")
    for name in VARIANTS:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
        median = statistics.median(seconds[name])
        figures[name] = {
            "seconds": median,
            "ratio": ratio,
            "flops": flops[name],
            "flops_ratio": flops[name] / flops[base],
        }
        print(f"{name:<16} {median:8.3f} {ratio:6.2f} {flops[name] / 1e9:8.1f} {flops[name] / flops[base]:6.2f} "
              f"{flops[name] / median / 1e9:8.1f}")
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "figures": figures})


if __name__ == "__main__":
    run(main)
