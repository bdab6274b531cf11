"""`python recipes/ablate.py` as its users start it: stopped, started again, with a row that crashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from helpers.recipe_process import call, command, error_lines, fork_recipe, forked
from helpers.tiny_run import write_config
from helpers.waiting import wait, wait_until

from loopitr.training import grid_running

ROWS = [{"name": "base"}, {"name": "long", "overrides": {"train.epochs": 4, "train.checkpoint_every": 4}}]


def write_grid(folder, rows):
    write_config(folder, train__max_steps=None)
    (folder / "grid.yaml").write_text(yaml.safe_dump({"base": "tiny.yaml", "seeds": [0], "rows": rows}))
    return folder / "grid.yaml"


@pytest.mark.slow
def test_a_stopped_ablation_goes_on_and_repeats_no_finished_run(tmp_path):
    words = command("ablate.py", write_grid(tmp_path, ROWS), "--output", tmp_path / "out")[1:]
    pid = fork_recipe(words, tmp_path / "output", tmp_path / "output")
    checkpoint, children = tmp_path / "out" / "long" / "seed-0" / "checkpoints" / "step-00000004", []
    try:
        wait_until(checkpoint.exists, 600)
        children = psutil.Process(pid).children(recursive=True)
    finally:
        os.kill(pid, signal.SIGTERM)
        assert wait(pid, 60) == 128 + signal.SIGTERM, (tmp_path / "output").read_text()
    assert children and not any(child.is_running() for child in children)
    first, second = (tmp_path / "out" / name / "seed-0" for name in ("base", "long"))
    assert (first / "metrics.json").exists() and not (second / "metrics.json").exists()
    assert "1/1" in (tmp_path / "out" / "ablation.md").read_text()  # a table after the first run
    written = (first / "metrics.json").stat().st_mtime_ns, (first / "model.safetensors").stat().st_mtime_ns

    again = forked("ablate.py", tmp_path / "grid.yaml", "--output", tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert "base, seed 0" not in again.stdout and "[2/2] long, seed 0: resumed" in again.stdout
    assert written == ((first / "metrics.json").stat().st_mtime_ns, (first / "model.safetensors").stat().st_mtime_ns)
    assert "resuming from step" in (second.with_name("seed-0.log")).read_text()
    assert json.loads((second / "metrics.json").read_text())["training"]["steps"] == 32
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert table in again.stdout and "| long |  1/1 |" in table
    assert {path.name for path in (tmp_path / "out" / "long").iterdir()} == {"seed-0", "seed-0.log", "seed-0.yaml"}


@pytest.mark.slow
def test_a_row_that_crashes_does_not_end_the_grid(tmp_path, monkeypatch):
    """Its options are understood, and only the run itself can see that they are wrong. The runs are forked."""

    class Forked:
        def __init__(self, words, *, stdout, **_):
            self.pid = fork_recipe(words[1:], Path(stdout.name), Path(stdout.name))

        def wait(self):
            return wait(self.pid)

    process = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(grid_running, "subprocess", process)
    rows = [{"name": "bad", "overrides": {"model.vision.name": "resnet10tt"}}, {"name": "good"}]
    done = forked("ablate.py", write_grid(tmp_path, rows), "--output", tmp_path / "out", "--", "--train.max_steps", 1)
    assert done.returncode == 1
    assert "bad, seed 0: failed: " in done.stdout and "[2/2] good, seed 0: finished" in done.stdout
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "Failed:\n\n- bad, seed 0: " in table and "resnet10tt" in table
    assert json.loads((tmp_path / "out" / "good" / "seed-0" / "metrics.json").read_text())["training"]["steps"] == 1
    (tmp_path / "out" / "ablation.md").unlink()
    extra = ["--", "--train.max_steps", 1]
    rebuilt = forked("ablate.py", write_grid(tmp_path, rows), "--output", tmp_path / "out", "--table_only", *extra)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert (tmp_path / "out" / "ablation.md").read_text() == table and "seed 0: started" not in rebuilt.stdout


@pytest.mark.parametrize(
    ("rows", "arguments", "named"),
    [
        ([{"name": "base"}, {"name": "odd", "overrides": {"train.speed": 1}}], [], "row 'odd'"),
        (ROWS, ["--order", "sideways"], "sideways"),
        (ROWS, ["--", "--train.sped", "1"], "row 'base'"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_run(tmp_path, monkeypatch, capsys, rows, arguments, named):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    grid = write_grid(tmp_path, rows)
    status, errors = call(monkeypatch, capsys, "ablate.py", grid, "--output", tmp_path / "out", *arguments)
    (line,) = error_lines(errors)
    assert status == 2 and named in line
    assert not (tmp_path / "out").exists()


def test_changed_options_are_refused_before_the_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    folder = tmp_path / "out" / "long" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {epochs: 3}\n")
    status, errors = call(monkeypatch, capsys, "ablate.py", write_grid(tmp_path, ROWS), "--output", tmp_path / "out")
    (line,) = error_lines(errors)
    assert status == 2 and "row 'long'" in line
    assert not (tmp_path / "out" / "base").exists()
