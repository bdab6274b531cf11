"""python recipes/ablate.py recipes/configs/ablations/X.yaml [--output runs/ablations/X] [-- --train.epochs 3 ...]

Trains every row of a grid of options with every seed, one run after the other, and writes tables of the results:
`ablation.md`, `.csv` and `.png` in the output folder, which has each run in `ROW/seed-N` and its log next to it. After
an interruption, the same command continues: finished runs are kept, and a half-finished one is resumed. Options after
`--` apply to every run; those of the rows override them.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from loopitr.cli import parse, run
from loopitr.training.grid import GridRun, Progress, plan_runs, progress_of, read_grid
from loopitr.training.grid_running import execute, failure, stop_when_terminated
from loopitr.training.options import PretrainOptions

PRETRAIN = Path(__file__).with_name("pretrain.py")


@dataclass
class AblateOptions:
    """The grid, the output, and how to execute the runs."""

    grid: str
    """YAML file of base, seeds and rows (`loopitr.training.grid.read_grid`); it may be the first argument."""
    output: str | None = None
    """Folder for runs and tables; unset: runs/ablations/ and the grid's name."""
    order: Literal["by_seed", "by_row"] = "by_seed"
    """by_seed: all rows with the first seed, then all with the next, so that there is a table early; by_row: all seeds
    of the first row, then those of the next."""
    accelerate: str | None = None
    """Start each run by `accelerate launch` with these arguments, e.g. '--cpu --num_processes 2'; unset: by python."""
    table_only: bool = False
    """Write the tables of the runs so far, without training."""


def main() -> None:
    own, extra = split_at_dashes(sys.argv[1:])
    if own and not own[0].startswith("-"):
        own[0] = f"--grid={own[0]}"
    options = parse(AblateOptions, own, description=__doc__)
    grid = read_grid(Path(options.grid))
    output = Path(options.output or f"runs/ablations/{Path(options.grid).stem}")
    parse_run = partial(parse, PretrainOptions)
    runs = plan_runs(grid, output, parse_run, extra=extra, by_row=options.order == "by_row")
    progress = [progress_of(one, parse_run) for one in runs]  # All are checked before the first one starts.
    from loopitr.training.grid_table import markdown, write_tables  # It imports torch, which --help does not need.

    stop_when_terminated()
    failed = 0
    for number, (one, state) in enumerate(zip(runs, progress), 1):
        if not options.table_only and state is not Progress.FINISHED:
            failed += not train(one, state, options.accelerate, where=f"[{number}/{len(runs)}]")
            write_tables(runs, output)
    print(f"\n{markdown(write_tables(runs, output), title=output.name)}\nwritten to {output}")
    if failed:
        sys.exit(1)


def train(one: GridRun, state: Progress, accelerate: str | None, *, where: str) -> bool:
    """Execute a run; returns whether it finished."""
    launcher = [] if accelerate is None else ["-m", "accelerate.commands.launch", *shlex.split(accelerate)]
    resume = state is Progress.HALF
    print(f"{where} {one.row}, seed {one.seed}: {'resumed' if resume else 'started'}, log in {one.log}", flush=True)
    started = time.perf_counter()
    execute(one, [sys.executable, *launcher, str(PRETRAIN)], resume=resume)
    reason = failure(one)
    end = "finished" if reason is None else f"failed: {reason}"
    print(f"{where} {one.row}, seed {one.seed}: {end} after {time.perf_counter() - started:.0f} s", flush=True)
    return reason is None


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    run(main)
