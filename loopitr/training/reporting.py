"""What a run leaves behind: history, `metrics.json`, a Markdown table, a PNG of the curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from loopitr.evaluation.report import RetrievalResult
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.objective.parts import StepOutput
    from loopitr.training.checkpoints import Progress

HISTORY, METRICS = "history.jsonl", "metrics.json"


class History:
    """One JSON line per logged step, in the run folder; a resumed run drops what lies after its checkpoint."""

    def __init__(self, folder: Path, *, keep: int = 0) -> None:
        """`keep`: how many rows of an earlier history stay."""
        self.path = folder / HISTORY
        self.rows = read_history(folder)[:keep]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, step: int, values: dict[str, float]) -> None:
        row = {"step": step, **values}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The history's rows; a last line that a killed process left incomplete is ignored."""
    path = folder / HISTORY
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Complete or not at all: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def named_values(output: StepOutput) -> dict[str, Tensor]:
    """What a step is logged as: `loss/total`, `loss/TERM`, `train/METRIC`."""
    terms = {f"loss/{name}": value for name, value in output.terms.items()}
    return {"loss/total": output.loss, **terms, **{f"train/{name}": value for name, value in output.metrics.items()}}


def run_metrics(
    split: str,
    result: RetrievalResult,
    progress: Progress,
    seconds: float,
    skipped: dict[str, int],
    truncated: int,
) -> dict[str, Any]:
    """What `metrics.json` holds: the figures of the final table on `split`, and what the training was."""
    return {
        "split": split,
        **result.to_json(),
        "training": {
            "seconds": round(seconds, 1),
            "steps": progress.step,
            "best_step": progress.best_step,
            "best_val_mean_r1": progress.best,
            "skipped": skipped,
            "truncated_captions": truncated,
        },
    }


def write_results(
    folder: Path, metrics: dict[str, Any], table: str, rows: list[dict[str, Any]], model: LoopITRModel
) -> None:
    """`metrics.json`, `results.md` with the table, `curves.png` of the history's rows, and the card of the model, whose
    weights are saved there already."""
    from loopitr.building.card import write_card  # Options are read without what a model needs.

    write_json(folder / METRICS, metrics)
    (folder / "results.md").write_text(f"# {folder.name}: {metrics['split']}\n\n{table}\n")
    plot_curves(rows, folder / "curves.png")
    write_card(folder, model)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses over steps on the left, recall on the right."""
    from matplotlib.figure import Figure  # A figure of its own needs no global state and no display.

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, prefix, title, label in (
        (left, "loss/", "training losses", "loss"),
        (right, "val/", "validation mean R@1", "percent"),
    ):
        for name in sorted({key for row in rows for key in row if key.startswith(prefix)}):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points), label=name.removeprefix(prefix), marker="." if len(points) < 50 else "")
        axes.set(title=title, xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
