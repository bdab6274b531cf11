"""The results of a grid: means and standard deviations over seeds, as Markdown, CSV and a plot."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopitr.durable import write_files
from loopitr.evaluation.report import HEADS, markdown_table
from loopitr.training.grid import TABLE, GridRun
from loopitr.training.grid_running import attempts, failure

SCORES = {**HEADS, "reranked": "reranked"}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The mean over seeds and, for two or more, the sample standard deviation."""

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """One row of the table.

    Attributes:
        runs, finished: the number of runs, and of those with metrics.
        scores: mean R@1 in percent, by score.
        differences: the differences to the first row for each seed that both rows have. The effect of a seed on both
            rows cancels out.
        steps, seconds: of training. Resumed runs are left out of the seconds, since they do not know the time before.
        failures: seed -> reason, for runs that ended without metrics.
    """

    name: str
    runs: int
    finished: int
    scores: dict[str, Spread]
    differences: dict[str, Spread]
    steps: Spread | None
    seconds: Spread | None
    failures: dict[int, str]


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of values; None if there are none.

    Example:
        >>> print(spread([1.0, 2.0, 3.0]))
        2.0 ± 1.0
    """
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, count=len(values))


def summarize(runs: Sequence[GridRun]) -> list[RowSummary]:
    """The rows of the table, in the order of the runs."""
    by_row: dict[str, list[GridRun]] = {}
    for run in runs:
        by_row.setdefault(run.row, []).append(run)
    results = {name: {run.seed: run.metrics() for run in of_row} for name, of_row in by_row.items()}
    finished = {name: {seed: m for seed, m in of_row.items() if m is not None} for name, of_row in results.items()}
    first = next(iter(finished.values()), {})
    summaries = []
    for name, of_row in by_row.items():
        own = finished[name]
        seconds = [own[run.seed]["training"]["seconds"] for run in of_row if run.seed in own and attempts(run) < 2]
        failures = {run.seed: reason for run in of_row if (reason := failure(run)) is not None}
        summaries.append(
            RowSummary(
                name=name,
                runs=len(of_row),
                finished=len(own),
                scores=_spreads({s: [*_by_seed(own, s).values()] for s in SCORES}),
                differences=_spreads({s: _differences(_by_seed(own, s), _by_seed(first, s)) for s in SCORES}),
                steps=spread([metrics["training"]["steps"] for metrics in own.values()]),
                seconds=spread(seconds),
                failures=failures,
            )
        )
    return summaries


def markdown(summaries: Sequence[RowSummary], *, title: str) -> str:
    """A table of mean R@1, one of the differences to the first row, and the runs that failed or are not finished."""
    scores = [s for s in SCORES if any(s in row.scores for row in summaries)]
    names = [SCORES[s] for s in scores]
    rows = []
    for row in summaries:
        costs = ["" if value is None else f"{value.mean:,.0f}" for value in (row.steps, row.seconds)]
        shown = ["" if s not in row.scores else str(row.scores[s]) for s in scores]
        rows.append([row.name, f"{row.finished}/{row.runs}", *shown, *costs])
    parts = [f"# {title}", "Mean R@1 in percent, mean and standard deviation over seeds."]
    parts.append(markdown_table(["", "runs", *names, "steps", "seconds"], rows))
    if len(summaries) > 1:
        parts.append(f"Difference to {summaries[0].name} for each seed: mean and standard deviation.")
        rows = [[row.name, *(_signed(row.differences.get(s)) for s in scores)] for row in summaries[1:]]
        parts.append(markdown_table(["", *names], rows))
    failures = [f"- {row.name}, seed {seed}: {text}" for row in summaries for seed, text in row.failures.items()]
    if failures:
        parts += ["Failed:", "\n".join(failures)]
    waiting = sum(row.runs - row.finished - len(row.failures) for row in summaries)
    if waiting:
        parts.append(f"Not finished: {waiting} of {sum(row.runs for row in summaries)} runs.")
    return "\n\n".join(parts) + "\n"


def table_csv(summaries: Sequence[RowSummary]) -> str:
    """One line per row; cells without a value are empty."""
    header = ["row", "runs", "finished"]
    for name in SCORES:
        header += [f"{name}_mean", f"{name}_sd", f"{name}_difference_mean", f"{name}_difference_sd"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*header, "steps", "seconds", "failed"])
    for row in summaries:
        cells: list[Any] = [row.name, row.runs, row.finished]
        for name in SCORES:
            for value in (row.scores.get(name), row.differences.get(name)):
                cells += ["", ""] if value is None else [value.mean, "" if value.deviation is None else value.deviation]
        cells += ["" if value is None else value.mean for value in (row.steps, row.seconds)]
        writer.writerow([*cells, "; ".join(f"seed {seed}: {text}" for seed, text in row.failures.items())])
    return text.getvalue()


def plot(summaries: Sequence[RowSummary], path: Path, *, title: str) -> None:
    """Plot the mean R@1 of each row, with the standard deviation as a bar."""
    from matplotlib.figure import Figure  # Unlike pyplot, it has no global state and needs no display.

    figure = Figure(figsize=(9, 1.5 + 0.4 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    present = [s for s in SCORES if any(s in row.scores for row in summaries)]
    for number, score in enumerate(present):
        offset = 0.15 * (number - (len(present) - 1) / 2)
        points = [(place, row.scores[score]) for place, row in enumerate(summaries) if score in row.scores]
        axes.errorbar(
            [value.mean for _, value in points],
            [place + offset for place, _ in points],
            xerr=[value.deviation or 0.0 for _, value in points],
            fmt="o",
            capsize=2,
            label=SCORES[score],
        )
    axes.set(title=title, xlabel="mean R@1 in percent")
    axes.set_yticks(range(len(summaries)), [row.name for row in summaries])
    axes.set_ylim(len(summaries) - 0.5, -0.5)  # the first row on top
    axes.grid(alpha=0.3)
    if present:
        axes.legend()
    figure.savefig(path, dpi=120, format="png")


def write_tables(runs: Sequence[GridRun], output: Path) -> list[RowSummary]:
    """Write `ablation.md`, `.csv` and `.png` to `output`, each atomically."""
    summaries = summarize(runs)

    def write(folder: Path) -> None:
        (folder / f"{TABLE}.md").write_text(markdown(summaries, title=output.name), encoding="utf-8")
        (folder / f"{TABLE}.csv").write_text(table_csv(summaries), encoding="utf-8")
        plot(summaries, folder / f"{TABLE}.png", title=output.name)

    write_files(output, write)
    return summaries


def _by_seed(metrics: Mapping[int, dict[str, Any]], score: str) -> dict[int, float]:
    return {seed: m[score]["mean_r1"] for seed, m in metrics.items() if isinstance(m.get(score), dict)}


def _differences(own: Mapping[int, float], first: Mapping[int, float]) -> list[float]:
    return [own[seed] - first[seed] for seed in own if seed in first]


def _spreads(values: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    spreads = {name: spread(of_seeds) for name, of_seeds in values.items()}
    return {name: value for name, value in spreads.items() if value is not None}


def _signed(value: Spread | None) -> str:
    return "" if value is None else f"{'+' if value.mean >= 0 else ''}{value}"
