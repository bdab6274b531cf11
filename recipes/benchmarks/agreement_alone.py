"""python recipes/benchmarks/agreement_alone.py [--images 100] [--layers 2] [--rounds 15] [--output F.json]

Measures the reranking of one caption's candidates by token agreement alone (`model.fusion.num_layers 0`) against a
fusion head that has layers besides. The image tokens are already computed. Both heads run interleaved in one process;
the medians of their seconds and of the ratios are reported. The default sizes are those of configs/flickr8k.yaml at 224
px: 49 image tokens of width 1,280 and a text backbone of width 384.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from shared import check_options, interleaved

import loopitr
from loopitr.cli import parse, run
from loopitr.evaluation.report import markdown_table
from loopitr.training.reporting import write_json

TEXT_WIDTH, WORDS = 384, 14


@dataclass
class Options:
    images: int = 100
    layers: int = 2
    rounds: int = 15
    device: str = "cpu"
    output: str | None = None
    """JSON file for the figures."""


def model_with(layers: int, device: str) -> loopitr.LoopITRModel:
    """A model with EfficientNet's and MiniLM's widths; its backbones, which do not run here, are not pretrained."""
    config = loopitr.LoopITRConfig(
        vision={"name": "tf_efficientnet_lite0", "image_size": 224},
        text={"model_type": "bert", "hidden_size": TEXT_WIDTH, "num_hidden_layers": 1, "num_attention_heads": 12},
        fusion={"num_layers": layers, "num_heads": 12, "agreement": 256},
    )
    torch.manual_seed(0)
    return loopitr.LoopITRModel(config).eval().to(torch.device(device))  # type: ignore[arg-type]


@torch.inference_mode()
def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    heads = {f"{options.layers} layers": options.layers, "alone": 0}
    models = {name: model_with(layers, options.device) for name, layers in heads.items()}
    tokens = torch.randn(options.images, 49, 1280, device=options.device)
    words = torch.randn(1, WORDS, TEXT_WIDTH, device=options.device)
    texts = loopitr.TextState(words[:, 0], words, torch.ones(1, WORDS, dtype=torch.bool, device=options.device))
    images = loopitr.ImageState(tokens[:, 0], tokens)
    pairs = torch.stack([torch.arange(options.images), torch.zeros(options.images, dtype=torch.long)], 1)
    timed = interleaved(
        {name: lambda model=model: model.score_pairs(images, texts, pairs).score for name, model in models.items()},
        rounds=options.rounds,
        device=options.device,
    )
    layered, alone = timed[f"{options.layers} layers"], timed["alone"]
    rows = [[name, f"{part.median * 1000:.1f}", f"{part.flops / 1e9:.2f}"] for name, part in timed.items()]
    print(f"{options.images} images for one caption of {WORDS} tokens, {torch.get_num_threads()} threads")
    print(markdown_table(["fusion head", "ms", "GFLOP"], rows))
    print(f"ratio {layered.ratio(alone):.1f}")
    if options.output:
        figures = {name: {"seconds": part.median, "flops": part.flops} for name, part in timed.items()}
        ratio = layered.ratio(alone)
        write_json(Path(options.output), {"options": vars(options), "figures": figures, "ratio": ratio})


if __name__ == "__main__":
    run(main)
