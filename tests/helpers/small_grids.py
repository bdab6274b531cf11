"""Grids of runs that nothing trains: written, planned, and finished by hand."""

import dataclasses
import json
import sys
from functools import partial

import yaml
from helpers.tiny_run import write_config

from loopitr.cli import parse
from loopitr.training.grid import plan_runs, read_grid
from loopitr.training.grid_running import execute
from loopitr.training.options import PretrainOptions

parse_run = partial(parse, PretrainOptions)
ROWS = [{"name": "base"}, {"name": "slow", "overrides": ["--train.lr 1e-5"]}]


def write_grid(folder, **tree):
    write_config(folder)
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": "tiny.yaml", "seeds": [0, 1], "rows": ROWS, **tree}))
    return path


def plan(folder, output=None, *, extra=(), by_row=False, **tree):
    grid = read_grid(write_grid(folder, **tree))
    return plan_runs(grid, output or folder / "out", parse_run, extra=extra, by_row=by_row)


def finish(run, *, dual=50.0, match=40.0, steps=8, seconds=3.0, **more):
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(run.options)))
    scores = {"dual": {"mean_r1": dual}, "match": {"mean_r1": match}, "match_plus_similarity": None}
    training = {"steps": steps, "seconds": seconds}
    (run.folder / "metrics.json").write_text(json.dumps({**scores, "training": training, **more}))


def script(run, text, *, resume=False):
    """A program in the place of `pretrain.py`."""
    return execute(run, [sys.executable, "-c", text], resume=resume)
