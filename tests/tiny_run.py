"""A training run of seconds on the built-in scenes: its options, and what several runs in one process need."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState, GradientState

from loopitr.cli import parse
from loopitr.options import PretrainOptions

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
            "kwargs": {  # transformers' default dropout of 0.1 stays on
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
        "scenes_train": 64,
        "scenes_val": 16,
        "scenes_image_size": 32,
        "num_workers": 0,
        "crop_scale_min": 0.5,
        "randaugment": True,
    },
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


def reset_accelerate() -> None:
    """accelerate keeps one state per process; another run in it starts anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
