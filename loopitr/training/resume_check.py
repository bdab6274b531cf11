"""Compares the options of a resumed run with those in the folder's `config.yaml`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from loopitr.reading import user_path
from loopitr.training.options import PretrainOptions

# Options of one command, not of the run, which are not written to `config.yaml`.
NOT_STORED = ("resume", "resume_with_changes")
# Options that change neither a training step nor the choice of the best model.
FREE = (
    *("train.output_dir", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every", "train.tracker"),
    *("train.checkpoint_minutes", "train.max_bad_steps", "train.license"),
    "data.scenes",  # Older runs do not have it; another source shows by its own option.
    *("data.max_skipped_fraction", "validation.batch_size", "validation.final_rerank", "validation.final_split"),
    "validation.gallery_queries",
)
FOLDERS = ("data.cache_images", "data.cache_tokens", "data.cache_text_tokens")  # Only whether they are set matters.
PLACES = (  # Two spellings of the same place are no change.
    *("data.karpathy", "data.albef", "data.table", "data.hub", "data.images", "data.val_albef", "data.val_table"),
    *("model.init", "model.pair", "objective.teacher_model"),
)
MISSING = object()


def stored_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options to write to `config.yaml`, in the types that they have when loaded from there."""
    stored = {name: value for name, value in config.items() if name not in NOT_STORED}
    loaded: dict[str, Any] = yaml.safe_load(yaml.safe_dump(stored))
    return loaded


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` for each changed option that affects training; an option missing in one has its default.

    Example:
        >>> from loopitr.training.resume_check import changed_options
        >>> changed_options({"train": {"lr": 0.1, "epochs": 10}}, {"train": {"lr": 0.2, "output_dir": "elsewhere"}})
        ['train.lr: 0.1 -> 0.2']
    """
    before, after = flat_options(stored_config(old)), flat_options(stored_config(new))
    defaults = flat_options(stored_config(asdict(PretrainOptions())))
    streams = bool(before.get("data.streaming") or after.get("data.streaming"))
    # The workers of a loader share the files of a stream, so their number affects its order.
    free = FREE if streams else (*FREE, "data.num_workers", "data.shuffle_buffer")
    changes = []
    for name in {**before, **after}:
        default = defaults.get(name, MISSING)
        values = [side.get(name, default) for side in (before, after)]
        if name in free or values[0] == values[1]:
            continue
        if (name in FOLDERS and None not in values) or (name in PLACES and _same_place(*values)):
            continue
        changes.append(
            f"{name}: {' -> '.join('unset' if value in (MISSING, None) else str(value) for value in values)}"
        )
    return changes


def _same_place(a: Any, b: Any) -> bool:
    try:
        return os.path.samefile(user_path(a), user_path(b))
    except (OSError, TypeError, ValueError):
        return False


def flat_options(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted names, without empty groups; tuples become lists, since YAML has no tuples.

    Example:
        >>> from loopitr.training.resume_check import flat_options
        >>> flat_options({"train": {"lr": 0.1}, "seeds": (0, 1)})
        {'train.lr': 0.1, 'seeds': [0, 1]}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flat_options(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
