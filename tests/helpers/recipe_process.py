"""Recipes as their users start them: in a process of its own, or, for speed, in this one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils.other import get_free_port
from forked import fork
from helpers.waiting import wait_for_all

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


def fork_recipe(words: Sequence[str], output: Path, errors: Path, **variables: object) -> int:
    """Fork a process that runs `python words`, without importing torch again; returns its pid."""

    def work() -> None:
        from helpers.tiny_run import reset_accelerate  # It imports this module.

        reset_accelerate()
        os.environ.update(environment() | {name: str(value) for name, value in variables.items()})
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")

    return fork(work, output)


def forked(recipe: str, *arguments: Any, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`python recipes/RECIPE arguments` in processes forked from this one, which has imported torch already.

    Several ranks get the variables that torchrun sets; the output is that of all, the status the first that is not 0.
    """
    words = command(recipe, *arguments)[1:]
    variables: list[dict[str, object]] = [{}]
    if ranks > 1:
        meeting = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": get_free_port()}
        sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        variables = [{**meeting, **sizes, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("output", "errors")]
        statuses = wait_for_all([fork_recipe(words, *files, **own) for own in variables], 600)
        status = next(filter(None, statuses), 0)
        return subprocess.CompletedProcess(words, status, *(file.read_text() for file in files))


def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str, *arguments: Any
) -> subprocess.CompletedProcess[str]:
    """`python recipes/RECIPE arguments` in this process, which spares the seconds in which a new one imports torch."""
    words = [recipe, *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    try:
        runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")
        status: Any = 0
    except SystemExit as stop:
        status = stop.code or 0
    written = capsys.readouterr()
    return subprocess.CompletedProcess(words, status, written.out, written.err)


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str, *arguments: Any
) -> tuple[int, str]:
    """The exit status and the standard error of `run_here`."""
    done = run_here(monkeypatch, capsys, recipe, *arguments)
    return done.returncode, done.stderr


def error_lines(errors: str) -> list[str]:
    """The lines in which a recipe names an error that its user can mend; progress bars share the stream."""
    assert "Traceback" not in errors and "usage:" not in errors
    return [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error: ")]


def started(*arguments):
    """The printed lines of `loopitr arguments` in a process of its own, and the heavy modules that it imported."""
    code = """
import sys
from loopitr.commands.main import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print([name for name in ("torch", "transformers", "datasets", "timm") if name in sys.modules])
"""
    words = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
