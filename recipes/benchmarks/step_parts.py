"""python recipes/benchmarks/step_parts.py [--run_config recipes/configs/scenes.yaml] [--rounds 9] [--output F.json]

Measures where the time of a training step goes: the backbones alone, then the objective with one more term at a time
(forward and backward), and the optimiser. Model and objective are those of a config, and the batch is random. All run
interleaved in one process; the time of a part is the median over rounds of what it adds to the one before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from shared import check_options, interleaved, random_batch

from loopitr.cli import parse, run
from loopitr.evaluation.report import markdown_table
from loopitr.training.options import PretrainOptions
from loopitr.training.reporting import write_json

CONFIG = Path(__file__).parents[1] / "configs" / "scenes.yaml"


@dataclass
class Options:
    run_config: str = str(CONFIG)
    """The config of the run; its model must not start from the folder of another run."""
    batch_size: int | None = None
    """Unset: that of the run."""
    rounds: int = 9
    device: str = "cpu"
    output: str | None = None
    """JSON file for the figures."""


def parts_of(options: Options) -> dict[str, Callable[[], Any]]:
    """The calls to time, by name; each does the same as the one before it, and one thing more."""
    from loopitr.building.build import build_model
    from loopitr.data import scene_vocabulary
    from loopitr.objective.build import build_masking, build_objective

    chosen = parse(PretrainOptions, ["--config", options.run_config]).decided()
    model, processor = build_model(chosen.model, vocabulary=scene_vocabulary())
    model.to(torch.device(options.device)).train()  # type: ignore[arg-type]
    size, pixels = options.batch_size or chosen.train.batch_size, model.config.vision["image_size"]
    batch = random_batch(size, image_size=pixels, device=options.device)
    words = len(processor.tokenizer)
    batch["input_ids"] = batch["input_ids"] % (words - 5) + 5  # The first ids of both tokenizers are special tokens.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def image_backbone() -> None:
        model.zero_grad()
        model.dual.get_image_features(batch["pixel_values"]).sum().backward()

    def both_backbones() -> None:
        image_backbone()
        model.dual.get_text_features(batch["input_ids"], batch["attention_mask"]).sum().backward()

    def step(**weights: float) -> Callable[[], None]:
        objective_options = replace(chosen.objective, **weights)  # type: ignore[arg-type]
        masking = build_masking(processor.tokenizer, objective_options, [])
        objective = build_objective(model, objective_options, masking=masking)

        def forward_and_backward() -> None:
            model.zero_grad()
            objective(**batch).loss.backward()

        return forward_and_backward

    def whole() -> None:
        everything()
        optimizer.step()

    pairs = {"itm": 0.0, "lce": 0.0, "distillation": 0.0}
    calls: dict[str, Callable[[], Any]] = {"image backbone": image_backbone, "text backbone": both_backbones}
    calls["the rest of ITC"] = step(mlm=0.0, agreement=0.0, **pairs)
    if chosen.objective.mlm:
        calls["word prediction"] = step(agreement=0.0, **pairs)
    if chosen.objective.agreement:
        calls["token agreement"] = step(**pairs)
    everything = step()
    if any(getattr(chosen.objective, name) for name in pairs):
        calls[f"pairs (K = {chosen.objective.num_negatives})"] = everything
    return {**calls, "optimiser": whole}


def main() -> None:
    options = parse(Options, description=__doc__)
    check_options(options)
    calls = parts_of(options)
    timed = interleaved(calls, rounds=options.rounds, device=options.device)
    before = [0.0] * options.rounds
    figures, rows = {}, []
    for name, timing in timed.items():
        figures[name] = statistics.median(now - then for now, then in zip(timing.seconds, before, strict=True))
        before = timing.seconds
    total = statistics.median(before)
    figures["the whole step"] = total
    for name, seconds in figures.items():
        rows.append([name, f"{1e3 * seconds:.0f}", f"{seconds / total:.2f}"])
    print(
        f"{options.run_config}, {options.device}, {torch.get_num_threads()} threads, median of {options.rounds} rounds"
    )
    print(markdown_table(["part", "ms", "share"], rows))
    if options.output:
        write_json(
            Path(options.output),
            {"options": vars(options), "figures": {name: {"seconds": seconds} for name, seconds in figures.items()}},
        )


if __name__ == "__main__":
    run(main)
