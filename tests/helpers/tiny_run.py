"""A training run of seconds on the built-in scenes: its options, and what several runs in one process need."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from helpers.recipe_process import ROOT
from helpers.tiny_gallery import captions, jpeg
from safetensors.torch import load_file
from torch import Tensor

from loopitr.cli import parse
from loopitr.training import reporting
from loopitr.training.options import PretrainOptions
from loopitr.training.reporting import read_history
from loopitr.training.trainer import Trainer

OPTIONS: dict[str, Any] = {
    "model": {
        "vision": {
            "name": "resnet10t",
            "image_size": 32,
            "pretrained": False,
            "kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8, "output_stride": 8},
        },
        "text": {
            "name": "scenes",
            "pretrained": False,
            "max_length": 32,
            "kwargs": {  # The default dropout of transformers, 0.1, stays on.
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "max_position_embeddings": 32,
            },
        },
        "fusion": {"num_layers": 1, "num_heads": 2, "intermediate_size": 32, "dropout": 0.1},
        "embed_dim": 16,
    },
    "data": {
        "scenes": True,
        "scenes_train": 64,
        "scenes_val": 16,
        "scenes_image_size": 32,
        "num_workers": 0,
        "crop_scale_min": 0.5,
        "randaugment": True,
    },
    # An untrained teacher is never ahead; which words are hidden is drawn at random.
    "objective": {"distillation": 1.0, "agreement": 0.0, "teacher_margin": None, "mlm": 0.0},
    "train": {
        "epochs": 1,
        "batch_size": 8,
        "backbone_lr": 1e-3,
        "lr": 1e-3,
        "checkpoint_every": 0,
        "log_every": 1,
        "tracker": "none",
    },
    "validation": {"rerank": 4, "final_rerank": 8},
}

VIT: dict[str, Any] = {  # A ViT has no batch statistics; these are changes of `OPTIONS`.
    "model__vision": {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "pretrained": False,
        "pooling": "mean",
        "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    }
}
NO_DROPOUT: dict[str, Any] = {
    "model__text__kwargs": {
        **OPTIONS["model"]["text"]["kwargs"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "model__fusion__dropout": 0.0,
}
NO_AUGMENTATION: dict[str, Any] = {"data__randaugment": False, "data__crop_scale_min": 1.0}


def write_config(folder: Path, **changes: Any) -> Path:
    """A YAML file of `OPTIONS`, with `train__epochs=2` and the like; the run goes to `folder / "run"`."""
    tree = copy.deepcopy(OPTIONS)
    tree["train"]["output_dir"] = str(folder / "run")
    for name, value in changes.items():
        *groups, last = name.split("__")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def tiny_options(folder: Path, **changes: Any) -> PretrainOptions:
    return parse(PretrainOptions, [f"--config={write_config(folder, **changes)}"])


def make_trainer(options: PretrainOptions) -> Trainer:
    """What the recipe runs."""
    return runpy.run_path(str(ROOT / "recipes" / "pretrain.py"))["make_trainer"](options)


def without_curves() -> AbstractContextManager[object]:
    """To draw `curves.png` takes a quarter of a tiny run; tests/recipes start runs that draw it."""
    return mock.patch.object(reporting, "plot_curves")


def reset_accelerate() -> None:
    """accelerate keeps one state per process; another run in it starts anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def trainer(folder: Path, **changes: Any) -> Iterator[Trainer]:
    """All that a run is made of, before its first step."""
    folder.mkdir(exist_ok=True)
    reset_accelerate()
    try:
        with without_curves():
            yield make_trainer(tiny_options(folder, **changes))
    finally:
        reset_accelerate()


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Train in this process; returns the metrics."""
    folder.mkdir(exist_ok=True)
    reset_accelerate()
    try:
        with without_curves():
            return make_trainer(tiny_options(folder, **changes)).run()
    finally:
        reset_accelerate()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(folder: Path, name: str) -> list[Any]:
    return [row[name] for row in read_history(folder / "run") if name in row]


def write_table(folder: Path, splits: dict[str, range], *, broken: tuple[int, ...] = (), per_image: int = 2) -> Path:
    """`folder/data.csv` and `folder/images/` of numbered JPEGs; those in `broken` are truncated."""
    (folder / "images").mkdir(parents=True)
    lines = ["image,caption,split"]
    for split, numbers in splits.items():
        for i in numbers:
            data = jpeg(i)
            (folder / "images" / f"{i}.jpg").write_bytes(data[:200] if i in broken else data)
            lines += [f"{i}.jpg,{caption},{split}" for caption in captions(i, per_image)]
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    return folder / "data.csv"


def broken_table(folder: Path) -> dict[str, Any]:
    """Changes of `OPTIONS`: 24 training and 8 validation images, one of each broken."""
    table = write_table(folder / "table", {"train": range(24), "val": range(24, 32)}, broken=(5, 30))
    return {
        "data__table": str(table),
        "data__images": str(table.parent / "images"),
        "data__max_skipped_fraction": 0.2,
    }
