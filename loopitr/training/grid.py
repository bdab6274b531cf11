"""A grid of runs (rows of changed options times seeds) read from YAML, its runs, and their state."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from loopitr.reading import read_object, read_yaml
from loopitr.training.options import PretrainOptions
from loopitr.training.resume_check import flat_options

Parser = Callable[[list[str]], PretrainOptions]
TABLE = "ablation"  # the name of the files with the tables, without their suffix
NAME = re.compile(rf"(?!{TABLE}\.)\w[\w .,+=%-]*")
OF_THE_GRID = {"--train.seed", "--train.output_dir", "--resume", "--print_config", "--help", "-h"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: its name, and the options that it changes, as words of a command line."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid; `base` has the words of a command line that all rows begin with."""

    base: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]


class Progress(Enum):
    """The state of a run."""

    NEW = "new"
    HALF = "half-finished"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """One row with one seed. It trains in `folder`; its options and its log are files next to that folder."""

    row: str
    seed: int
    options: PretrainOptions

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.options.train.output_dir)

    @property
    def config(self) -> Path:
        """The file with the options that the run is started with."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        """The file with the output of the run."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def metrics(self) -> dict[str, Any] | None:
        """The content of the run's `metrics.json`; None before its end."""
        path = self.folder / "metrics.json"
        return read_object(path) if path.is_file() else None


def read_grid(path: Path) -> Grid:
    """Read a grid from a YAML file.

        base: {config: ../scenes.yaml, overrides: {train.epochs: 24}}   # or only the path of the config
        seeds: [0, 1, 2]
        rows:
          - {name: base}
          - {name: without MLM, overrides: [--objective.mlm 0, --model.mlm_head false]}
          - {name: K 8, overrides: {objective.num_negatives: 8}}

    The config's path is relative to the file. The table compares each row with the first one.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a grid; the message names the file and the row.
    """
    try:
        tree = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(tree, dict) or not {"rows"} <= tree.keys() <= {"base", "seeds", "rows"}:
        raise ValueError(f"{path} must be a mapping of base, seeds and rows, got {_shown(tree)}")
    seeds = tree.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(s) is not int or s < 0 for s in seeds):
        raise ValueError(f"{path}: seeds must be a list of integers >= 0, got {_shown(seeds)}")
    if len({*seeds}) < len(seeds):
        raise ValueError(f"{path}: a seed occurs twice in {_shown(seeds)}")
    if not isinstance(tree["rows"], list) or not tree["rows"]:
        raise ValueError(
            f"{path}: rows must be a list of mappings with a name and overrides, got {_shown(tree['rows'])}"
        )
    rows = tuple(_row(entry, path) for entry in tree["rows"])
    names = [row.name for row in rows]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"{path}: two rows are named {duplicates[0]!r}")
    return Grid(base=_base(tree.get("base"), path), seeds=tuple(seeds), rows=rows)


def plan_runs(
    grid: Grid, output: Path, parse: Parser, *, extra: Sequence[str] = (), by_row: bool = False
) -> list[GridRun]:
    """All runs of the grid, in the order in which they are executed.

    Args:
        parse: turns the words of a command line into options.
        extra: words that override those of the base, and that those of the rows override.
        by_row: execute all seeds of the first row first, instead of all rows with the first seed.

    Raises:
        ValueError: a row has invalid options; the message names the row.
    """
    _refuse_own(extra, "the options after --")
    runs = []
    for row in grid.rows:
        try:
            options = parse([*grid.base, *extra, *row.words])
        except ValueError as error:
            raise ValueError(f"row {row.name!r}: {error}") from error
        for seed in grid.seeds:
            folder = output / row.name / f"seed-{seed}"
            train = dataclasses.replace(options.train, seed=seed, output_dir=str(folder))
            runs.append(GridRun(row=row.name, seed=seed, options=dataclasses.replace(options, train=train)))
    order = {seed: number for number, seed in enumerate(grid.seeds)}
    return runs if by_row else sorted(runs, key=lambda run: order[run.seed])


def progress_of(run: GridRun, parse: Parser) -> Progress:
    """The state of a run, from the content of its folder.

    The recorded options are compared with the grid's after unset ones got the values that a run chooses for them.
    Recorded options may lack some that were added to the package later; these have their defaults.

    Raises:
        ValueError: the run in the folder was trained with other options.
    """
    recorded = run.folder / "config.yaml"
    if not recorded.is_file() or not recorded.read_text().strip():  # A killed run may not have written its options.
        return Progress.NEW
    try:
        before = parse([f"--config={recorded}"])
    except ValueError as error:
        raise ValueError(f"row {run.row!r}: {recorded} cannot be compared with the row's options: {error}") from error
    old, new = (flat_options(dataclasses.asdict(options.decided())) for options in (before, run.options))
    for own in ("train.output_dir", "resume"):
        del old[own], new[own]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise ValueError(
                f"row {run.row!r}: {run.folder} was trained with {name} {old.get(name)}, the grid has {new.get(name)}; "
                "give the row another name, or move the folder away"
            )
    return Progress.HALF if run.metrics() is None else Progress.FINISHED


def _row(entry: Any, path: Path) -> Row:
    if not isinstance(entry, dict) or not {"name"} <= entry.keys() <= {"name", "overrides"}:
        raise ValueError(f"{path}: a row must be a mapping of a name and overrides, got {_shown(entry)}")
    name = str(entry["name"])
    if not NAME.fullmatch(name) or name != name.rstrip(" ."):
        raise ValueError(
            f"{path}: {name!r} cannot name a row: its folder has that name, of letters, digits, spaces and .,+=%-_"
        )
    return Row(name=name, words=_words(entry.get("overrides"), f"{path}: row {name!r}"))


def _base(entry: Any, path: Path) -> tuple[str, ...]:
    entry = {"config": entry} if isinstance(entry, str) else entry or {}
    if not isinstance(entry, dict) or not entry.keys() <= {"config", "overrides"}:
        raise ValueError(f"{path}: base must be a path, or a mapping of config and overrides, got {_shown(entry)}")
    words = _words(entry.get("overrides"), f"{path}: base")
    if entry.get("config") is None:
        return words
    return (f"--config={path.parent / str(entry['config'])}", *words)


def _words(overrides: Any, where: str) -> tuple[str, ...]:
    """The words of overrides: `{train.lr: 0.1}`, `[--train.lr 0.1]` and `[--train.lr, 0.1]` mean the same."""
    if isinstance(overrides, dict):
        words = [f"--{name}={_text(value)}" for name, value in overrides.items()]
    elif isinstance(overrides, list):
        parts: list[str] = []
        for item in map(_text, overrides):
            name, _, value = item.partition(" ")
            parts += [name, value.strip()] if name.startswith("--") and "=" not in name and value else [item]
        words = parts
    elif overrides is None:
        words = []
    else:
        raise ValueError(f"{where}: overrides must be a list or a mapping of dotted options, got {_shown(overrides)}")
    _refuse_own(words, where)
    return tuple(words)


def _refuse_own(words: Iterable[str], where: str) -> None:
    for word in words:
        if word.split("=")[0] in OF_THE_GRID:
            name = word.split("=")[0]
            raise ValueError(f"{where}: {name} cannot be given here; the grid sets the seeds and the output folders")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
