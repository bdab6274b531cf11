"""python recipes/benchmarks/encode.py [--vision NAME] [--rounds 9] [--device cuda] [--precision bf16] [--output F.json]

Measures what the dual head costs on top of its backbones: `get_image_features` against the forward pass of the timm
model, and `get_text_features` against that of the transformers model, on the same batch (captions of 14 tokens on
average, padded to 35, and captions of equal length). For a convolutional backbone it also compares encoding and
training in the memory layouts "contiguous" (column "bare") and "channels last". Weights are random, and all variants
run interleaved in one process. Reported are medians, throughput relative to the backbone's, FLOPs counted by
torch.utils.flop_counter, and the FLOP/s relative to those of a large matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from shared import PRECISIONS, check_options, interleaved, matmul_speed

import loopitr
from loopitr.cli import parse, run
from loopitr.evaluation.report import markdown_table
from loopitr.training.reporting import write_json

LENGTH = 35


@dataclass
class Options:
    vision: str = "vit_small_patch16_224"
    image_size: int = 224
    hidden_size: int = 384
    text_layers: int = 6
    batch_size: int = 32
    rounds: int = 9
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    output: str | None = None
    """JSON file for the figures."""


def build(options: Options) -> loopitr.DualEncoder:
    width = options.hidden_size
    text = {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": options.text_layers,
        "num_attention_heads": max(1, width // 32),
        "intermediate_size": 4 * width,
    }
    config = loopitr.DualEncoderConfig(vision={"name": options.vision, "image_size": options.image_size}, text=text)
    torch.manual_seed(0)
    model: Any = loopitr.DualEncoder(config).eval()
    return model.to(options.device, PRECISIONS[options.precision])


def train_images(model: loopitr.DualEncoder, pixels: torch.Tensor) -> None:
    """Forward and backward pass of the image side."""
    with torch.enable_grad():
        model.get_image_features(pixels).square().sum().backward()
    model.zero_grad()


def in_layout(
    model: loopitr.DualEncoder, memory_format: torch.memory_format, call: Callable[..., Any], *arguments: Any
) -> None:
    """A call of `call(*arguments)` with pixels in the given memory layout."""
    own = model.vision.memory_format
    model.vision.memory_format = memory_format
    call(*arguments)
    model.vision.memory_format = own


@torch.no_grad()
def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    device, dtype = options.device, PRECISIONS[options.precision]
    model, size = build(options), options.batch_size
    speed = matmul_speed(device, dtype)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(size, 3, options.image_size, options.image_size, generator=generator).to(device, dtype)
    lengths = torch.randint(8, 21, (size,), generator=generator)  # 14 on average
    mask = (torch.arange(LENGTH) < lengths[:, None]).long().to(device)
    ids = torch.randint(1000, 30000, mask.shape, generator=generator).to(device)
    full = torch.ones_like(mask[:, :14])
    layout = model.vision.memory_format
    laid_out = pixels.contiguous(memory_format=layout)
    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "images": (partial(model.vision.model, laid_out), partial(model.get_image_features, laid_out)),
        "captions, padded": (
            partial(model.text.model, ids * mask, attention_mask=mask),
            partial(model.get_text_features, ids * mask, mask),
        ),
        "captions of one length": (
            partial(model.text.model, ids[:, :14], attention_mask=full),
            partial(model.get_text_features, ids[:, :14], full),
        ),
    }
    if layout != torch.contiguous_format:
        for name, call in (
            ("images, layout", model.get_image_features),
            ("images, layout, trained", partial(train_images, model)),
        ):
            plain, own = (partial(in_layout, model, f, call, pixels) for f in (torch.contiguous_format, layout))
            sides[name] = plain, own
    print(
        f"{options.vision} {options.image_size} px, {options.text_layers} layers of width {options.hidden_size}, "
        f"B={size}, {options.precision}, {device}, {torch.get_num_threads()} threads, "
        f"matrix product {speed / 1e9:.0f} GFLOP/s"
    )
    figures, rows = {}, []
    for name, (bare, ours) in sides.items():
        timed = interleaved({"bare": bare, "ours": ours}, rounds=options.rounds, device=device)
        figures[name] = f = {
            "bare_per_second": size / timed["bare"].median,
            "per_second": size / timed["ours"].median,
            "throughput": timed["bare"].ratio(timed["ours"]),
            "flops": timed["ours"].flops,
            "of_peak": timed["ours"].flops / timed["ours"].median / speed,
        }
        rows.append(
            [
                name,
                f"{f['bare_per_second']:.1f}",
                f"{f['per_second']:.1f}",
                f"{f['throughput']:.3f}",
                f"{f['flops'] / 1e9:.1f}",
                f"{f['of_peak']:.2f}",
            ]
        )
    print(markdown_table(["what", "bare /s", "dual head /s", "of bare", "GFLOP", "of peak"], rows))
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "figures": figures})


if __name__ == "__main__":
    run(main)
