"""Training runs in processes that a test can kill: forked, so that each starts without importing torch again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import fork
from helpers.tiny_run import make_trainer, reset_accelerate, tiny_options, without_curves


def start(folder: Path, log: Path, *, prepare: Callable[[], object] = lambda: None, **changes: Any) -> int:
    """Fork a tiny run (`helpers.tiny_run`); `prepare` is called in the new process first."""
    folder.mkdir(exist_ok=True)
    options = tiny_options(folder, **changes)

    def work() -> None:
        reset_accelerate()
        prepare()
        with without_curves():
            make_trainer(options).run()

    return fork(work, log)


def steps_logged(folder: Path) -> int:
    """The last step in the history of a run that may be at work."""
    try:
        lines = (folder / "run" / "history.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0
