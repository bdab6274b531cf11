"""Recipes as their users start them: in a process of its own, or, for speed, in this one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = ("-m", "accelerate.commands.launch")
TWO_ON_CPU = (*ACCELERATE, "--cpu", "--num_processes", "2", "--main_process_port", "0")  # 0: any free one


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(recipe: str, *arguments: Any, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, str(ROOT / "recipes" / recipe), *map(str, arguments)]


def launch(recipe: str, *arguments: Any, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`python [launcher] recipes/RECIPE arguments`, to its end."""
    words = command(recipe, *arguments, launcher=launcher)
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str, *arguments: Any
) -> tuple[Any, str]:
    """In this process: (exit status, standard error)."""
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")
        status: Any = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def told(errors: str) -> list[str]:
    """What a recipe says of an error that its user can mend; progress bars share the stream."""
    assert "Traceback" not in errors and "usage:" not in errors
    return [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error: ")]
