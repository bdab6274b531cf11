"""The results that a run writes: history, `metrics.json`, a Markdown table, a page of examples, a PNG of the curves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopitr.durable import sync, write_file

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
    """The history of a run: one JSON line per logged step; a resumed run drops lines after its checkpoint."""

    def __init__(self, folder: Path, *, keep: int = 0, log: Callable[[str], None] = print) -> None:
        """
        Args:
            keep: the number of rows to keep of an earlier history.
            log: logs that the file cannot be written.
        """
        self.path, self.log = folder / HISTORY, log
        self.rows = read_history(folder)[:keep]
        self.is_behind = False  # whether rows are missing in the file
        self.flush()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add a row; if the disk is full, it is written together with later rows."""
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
                self.log(f"warning: {self.path} cannot be written ({error.strerror}); its rows are written later")
            self.is_behind = True

    def sync(self) -> None:
        """Sync the rows to the disk, before a checkpoint that relies on them.

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
            OSError: it cannot be written, and is unchanged.
        """
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.is_behind = False


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of the history in `folder`; an incomplete last line, of a killed process, is ignored."""
    path = folder / HISTORY
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """A context in which an `OSError` says what could not be written, and how to continue the run."""
    try:
        yield
    except OSError as error:
        text = f"{what} could not be written to {folder} ({error.strerror or error})"
        raise OSError(f"{text}; free space and continue with --resume") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_file(path, json.dumps(content, indent=2) + "\n")


def named_values(output: StepOutput) -> dict[str, Tensor]:
    """The values of a step by their names in the log: `loss/total`, `loss/TERM`, `train/METRIC`."""
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
    """The content of `metrics.json`: the results on `split`, and facts on the training."""
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
    """Write the results of a run to its folder, in which the model is already saved.

    These are `metrics.json`, `results.md` with the table of `result`, `gallery.html` if it has examples (of `records`),
    `curves.png` of the history's `rows`, and the model card.
    """
    from loopitr.building.card import write_card  # These imports are heavy; options are read without them.
    from loopitr.evaluation.gallery_html import gallery_page

    title = f"{folder.name}: {metrics['split']}"
    with writing("the results", folder):
        write_file(folder / "results.md", f"# {title}\n\n{result.table()}\n")
        if result.examples:
            write_file(folder / GALLERY, gallery_page(result, records, title=title))
        plot_curves(rows, folder / "curves.png")
        write_json(folder / METRICS, metrics)  # With this file the run counts as finished; the card reads it.
        write_card(folder, model)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot losses over steps on the left, recalls on the right."""
    from matplotlib.figure import Figure  # Unlike pyplot, it has no global state and needs no display.

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
