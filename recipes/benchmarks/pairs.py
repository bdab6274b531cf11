"""python recipes/benchmarks/pairs.py [--rounds 7] [--device cuda] [--precision bf16] [--output F.json]

Measures the scoring of pairs against a baseline with the same weights and captions (14 tokens on average, padded to
35). Image tokens and, in style `late`, text tokens are already computed. It compares

- one image with 32 captions, and one caption with 32 images (from cached keys and values, or from tokens), with 6 + 6
  layers, against a batch with a forward pass per pair, which repeats the image's tokens and projects keys and values
  for every pair;
- the same with the weights of transformers' `BlipForImageTextRetrieval`, against its text encoder.

Both run interleaved in one process. Reported are medians of seconds and of ratios, the largest difference between their
logits, FLOPs counted by torch.utils.flop_counter, and the FLOP/s relative to those of a large matrix product.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from shared import PRECISIONS, PlainPairs, check_options, interleaved, matmul_speed
from torch import Tensor

import loopitr
from loopitr.cli import parse, run
from loopitr.evaluation.report import markdown_table
from loopitr.training.reporting import write_json

LENGTH, HEADS = 35, 12


@dataclass
class Options:
    pairs: int = 32
    width: int = 768
    tokens: int = 197
    """Image tokens: 197 of ViT-B/16 at 224 px, 577 at 384 px."""
    rounds: int = 7
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    output: str | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        if self.width % HEADS:
            raise ValueError(f"width must be a multiple of the {HEADS} heads, got {self.width}")


@dataclass(frozen=True)
class Case:
    """Two functions that compute the same logits `[P, 2]`."""

    name: str
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]


def cases(options: Options) -> list[Case]:
    count, device = options.pairs, torch.device(options.device)
    dtype = PRECISIONS[options.precision]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 21, (count,), generator=generator)  # 14 on average
    mask = (torch.arange(LENGTH) < lengths[:, None]).to(device)
    tokens = torch.randn(count, options.tokens, options.width, generator=generator).to(device, dtype)
    words = torch.randn(count, LENGTH, options.width, generator=generator).to(device, dtype)
    ids = torch.randint(1000, 30000, (count, LENGTH), generator=generator).to(device) * mask
    embeds = torch.zeros(count, 1, device=device)  # Match scores do not depend on them.
    every, first = torch.arange(count), torch.zeros(count, dtype=torch.long)

    late: Any = _late_model(options).to(device, dtype)  # type: ignore[arg-type]
    captions, caption = loopitr.TextState(embeds, words, mask), loopitr.TextState(embeds[:1], words[:1], mask[:1])
    image, images = loopitr.ImageState(embeds[:1], tokens[:1]), loopitr.ImageState(embeds, tokens)
    cached = late.project_images(images)
    one_image, one_caption = torch.stack([first, every], 1), torch.stack([every, first], 1)

    plain = PlainPairs(late).logits

    def plain_one_image() -> Tensor:
        return plain(tokens[:1].expand(count, -1, -1), words, mask)

    def plain_one_caption() -> Tensor:
        return plain(tokens, words[:1].expand(count, -1, -1), mask[:1].expand(count, -1))

    blip: Any
    shared: Any
    blip, shared = _blip_models(options)
    blip.to(device, dtype)
    shared.to(device, dtype)

    def plain_blip() -> Tensor:
        hidden = blip.text_encoder(
            input_ids=ids,
            attention_mask=mask.long(),
            encoder_hidden_states=tokens[:1].expand(count, -1, -1),
            encoder_attention_mask=torch.ones(count, options.tokens, dtype=torch.long, device=device),
        ).last_hidden_state
        return blip.itm_head(hidden[:, 0])

    def ours_blip() -> Tensor:
        text = shared.dual.text
        embedded = text.model.embeddings(input_ids=ids)  # the input of its fusion layers
        return shared.score_pairs(image, loopitr.TextState(embeds, embedded, mask), one_image).logits

    return [
        Case(
            f"one image, {count} captions",
            lambda: late.score_pairs(image, captions, one_image).logits,
            plain_one_image,
        ),
        Case(
            f"one caption, {count} images, keys and values cached",
            lambda: late.score_pairs(cached, caption, one_caption).logits,
            plain_one_caption,
        ),
        Case(
            f"one caption, {count} images, tokens cached",
            lambda: late.score_pairs(images, caption, one_caption).logits,
            plain_one_caption,
        ),
        Case(f"BLIP, one image, {count} captions", ours_blip, plain_blip),
    ]


def _late_model(options: Options) -> loopitr.LoopITRModel:
    """The fusion half of ALBEF; its backbones, which do not run here, are small."""
    width = options.width
    config = loopitr.LoopITRConfig(
        vision={"name": "vit_tiny_patch16_224", "kwargs": {"embed_dim": width, "depth": 1, "num_heads": HEADS}},
        text={"model_type": "bert", "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": HEADS},
        vision_pooling="first",
        fusion={"style": "late", "num_layers": 6, "num_heads": HEADS},
    )
    torch.manual_seed(0)
    return loopitr.LoopITRModel(config).eval()


def _blip_models(options: Options) -> tuple[Any, loopitr.LoopITRModel]:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    from loopitr.convert import convert_blip

    sizes = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "num_attention_heads": HEADS}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 224, "patch_size": 16}  # does not run here
    config = BlipConfig(vision_config=vision, text_config={**sizes, "encoder_hidden_size": options.width})
    torch.manual_seed(0)
    theirs = BlipForImageTextRetrieval(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, convert_blip(folder)


@torch.inference_mode()
def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    speed = matmul_speed(options.device, PRECISIONS[options.precision])
    print(
        f"{options.pairs} pairs, width {options.width}, {options.tokens} image tokens, {options.precision}, "
        f"{options.device}, {torch.get_num_threads()} threads, matrix product {speed / 1e9:.0f} GFLOP/s"
    )
    figures, rows = {}, []
    for case in cases(options):
        difference = (case.ours().float() - case.plain().float()).abs().max().item()
        timed = interleaved({"plain": case.plain, "ours": case.ours}, rounds=options.rounds, device=options.device)
        plain, ours = timed["plain"], timed["ours"]
        figures[case.name] = f = {
            "plain_seconds": plain.median,
            "seconds": ours.median,
            "ratio": plain.ratio(ours),
            "plain_flops": plain.flops,
            "flops": ours.flops,
            "of_peak": ours.flops / ours.median / speed,
            "difference": difference,
        }
        rows.append(
            [
                case.name,
                f"{f['plain_seconds']:.3f}",
                f"{f['seconds']:.3f}",
                f"{f['ratio']:.2f}",
                f"{plain.flops / ours.flops:.2f}",
                f"{f['of_peak']:.2f}",
                f"{difference:.1e}",
            ]
        )
    print(markdown_table(["case", "plain s", "ours s", "ratio", "FLOP ratio", "of peak", "differ by"], rows))
    if options.output:
        write_json(Path(options.output), {"options": vars(options), "figures": figures})


if __name__ == "__main__":
    run(main)
