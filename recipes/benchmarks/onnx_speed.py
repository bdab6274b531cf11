"""python recipes/benchmarks/onnx_speed.py [--model RUN] [--rounds 31] [--threads 1] [--output F.json]

Compares eager torch with onnxruntime in each precision, on one text and on one image, interleaved in one process.
Reported are medians, and the speed-up over torch (median over rounds). Without `--model`, weights are random, with a
text backbone of MiniLM's size (6 layers of width 384) and the image backbone `vision`. Texts have 14 tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from shared import check_options, interleaved

import loopitr
from loopitr.cli import parse, run
from loopitr.evaluation.report import markdown_table
from loopitr.export.onnx_files import onnx_module
from loopitr.export.onnx_running import IMAGE, TEXT, OnnxModel
from loopitr.models.processing import image_processor, word_tokenizer
from loopitr.training.reporting import write_json

LENGTH = 14
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass
class Options:
    model: str | None = None
    """Run folder or exported dual encoder; unset: random weights."""
    vision: str = "tf_efficientnet_lite0"
    image_size: int = 224
    hidden_size: int = 384
    text_layers: int = 6
    rounds: int = 31
    threads: int = 1
    """Number of threads of torch and of onnxruntime."""
    device: Literal["cpu"] = "cpu"
    output: str | None = None
    """JSON file for the figures."""


def dual_and_processor(options: Options) -> tuple[loopitr.DualEncoder, loopitr.LoopITRProcessor]:
    if options.model is not None:
        model, processor = loopitr.load(options.model, dtype=torch.float32)
        return (model.dual_encoder() if isinstance(model, loopitr.LoopITRModel) else model).eval(), processor
    pixels = image_processor(options.image_size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    tokenizer = word_tokenizer([f"word{number}" for number in range(30000)], max_length=64)
    return _random_dual(options).eval(), loopitr.LoopITRProcessor(pixels, tokenizer)


def _random_dual(options: Options) -> loopitr.DualEncoder:
    text = {
        "model_type": "bert",
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.text_layers,
        "num_attention_heads": max(1, options.hidden_size // 32),
        "intermediate_size": 4 * options.hidden_size,
    }
    torch.manual_seed(0)
    return loopitr.DualEncoder(
        loopitr.DualEncoderConfig(vision={"name": options.vision, "image_size": options.image_size}, text=text)
    )


@torch.inference_mode()
def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    runtime = onnx_module("onnxruntime")
    torch.set_num_threads(options.threads)
    dual, processor = dual_and_processor(options)
    generator = torch.Generator().manual_seed(1)
    size = dual.config.vision["image_size"]
    ids = torch.randint(5, len(processor.tokenizer), (1, LENGTH), generator=generator)
    mask, pixels = torch.ones_like(ids), torch.randn(1, 3, size, size, generator=generator)
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "text": {"torch": partial(dual.get_text_features, ids, mask)},
        "image": {"torch": partial(dual.get_image_features, pixels)},
    }
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        exported = loopitr.export_onnx(dual, Path(folder, "onnx"), precisions=PRECISIONS[1:], processor=processor)
        print(f"largest difference from torch, fp32: {max(exported.parity.values()):.1e}")
        for precision in PRECISIONS:
            onnx = OnnxModel(exported.folder, names=[TEXT, IMAGE], precision=precision, threads=options.threads)
            calls["text"][precision] = partial(onnx.encode_texts, ids.numpy(), mask.numpy())
            calls["image"][precision] = partial(onnx.encode_images, pixels.numpy())
    print(
        f"{dual.config.vision['name']} {size} px, {dual.config.text['num_hidden_layers']} text layers, "
        f"{LENGTH} tokens, batch 1, {options.threads} threads, torch {torch.__version__}, "
        f"onnxruntime {runtime.__version__}"
    )
    figures, rows = {}, []
    for side, ways in calls.items():
        reference = ways["torch"]().numpy()
        timed = interleaved(ways, rounds=options.rounds, device=options.device)
        for way, timing in timed.items():
            made = ways[way]()
            figures[f"{side}, {way}"] = f = {
                "milliseconds": 1e3 * timing.median,
                "times_faster": timed["torch"].ratio(timing),
                "deviation": float(np.abs((made[0] if way != "torch" else made.numpy()) - reference).max()),
            }
            cells = [f"{f['milliseconds']:.2f}", f"{f['times_faster']:.2f}", f"{f['deviation']:.1e}"]
            rows.append([f"{side}, {way}", *cells])
    print(markdown_table(["what", "ms", "times faster", "off by"], rows))
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "figures": figures})


if __name__ == "__main__":
    run(main)
