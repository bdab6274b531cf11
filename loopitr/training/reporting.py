"""What a run leaves behind: history, `metrics.json`, a Markdown table, a page of examples, a PNG of the curves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopitr.training.durable import sync, write_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from loopitr.data import Record
    from loopitr.evaluation.report import RetrievalResult
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.objective.parts import StepOutput
    from loopitr.training.checkpoints import Progress

HISTORY, METRICS, GALLERY = "history.jsonl", "metrics.json", "gallery.html"


class History:
    """One JSON line per logged step, in the run folder; a resumed run drops what lies after its checkpoint."""

    def __init__(self, folder: Path, *, keep: int = 0, log: Callable[[str], None] = print) -> None:
        """
        Args:
            keep: how many rows of an earlier history stay.
            log: where it says that the disk is full.
        """
        self.path, self.log = folder / HISTORY, log
        self.rows = read_history(folder)[:keep]
        self.is_behind = False  # whether the file lacks rows
        self.flush()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Rows that a full disk does not take are written with later ones."""
        row = {"step": step, **values}
        self.rows.append(row)
        try:
            if self.is_behind:
                self.flush()
                return
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            if not self.is_behind:
                self.log(f"warning: {self.path} cannot be written ({error.strerror}): its rows wait for space")
            self.is_behind = True

    def sync(self) -> None:
        """Force the rows onto the disk: a checkpoint counts on them.

        Raises:
            OSError: they cannot be written.
        """
        if self.is_behind:
            self.flush()
        else:
            sync(self.path)

    def flush(self) -> None:
        """Write the whole file.

        Raises:
            OSError: it cannot be written; it is as it was.
        """
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.is_behind = False


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
    write_file(path, json.dumps(content, indent=2) + "\n")


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
    folder: Path,
    metrics: dict[str, Any],
    result: RetrievalResult,
    records: Sequence[Record],
    rows: list[dict[str, Any]],
    model: LoopITRModel,
) -> None:
    """`metrics.json`, `results.md` with the table of `result` on `records`, `gallery.html` with its examples, if it has
    any, `curves.png` of the history's rows, and the card of the model, whose weights are saved there already."""
    from loopitr.building.card import write_card  # Options are read without what a model needs.
    from loopitr.evaluation.gallery_page import gallery_page

    title = f"{folder.name}: {metrics['split']}"
    write_json(folder / METRICS, metrics)
    (folder / "results.md").write_text(f"# {title}\n\n{result.table()}\n")
    if result.examples:
        write_file(folder / GALLERY, gallery_page(result, records, title=title))
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
