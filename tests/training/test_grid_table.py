"""The table of a grid: means and differences as by hand, as Markdown and CSV."""

import csv
import io
import statistics

import pytest
from helpers.small_grids import finish, plan, script

from loopitr.training.grid_table import markdown, summarize, table_csv, write_tables

DUAL = {"base": [50.0, 52.0, 57.0], "slow": [51.0, 55.0, 58.0]}


@pytest.fixture
def finished(tmp_path):
    """Three seeds of two rows; one of the second has failed, and its `reranked` is of one seed only."""
    runs = plan(tmp_path, seeds=[0, 1, 2])
    for run in runs:
        if (run.row, run.seed) == ("slow", 1):
            script(run, "print('error: out of memory'); exit(1)")
            continue
        more = {"reranked": {"mean_r1": 70.0}} if (run.row, run.seed) == ("slow", 2) else {}
        finish(run, dual=DUAL[run.row][run.seed], seconds=10.0 * (run.seed + 1), steps=1000, **more)
    return runs


def test_means_and_differences_as_by_hand(finished):
    base, slow = summarize(finished)
    assert base.scores["dual"].mean == pytest.approx(53.0)
    assert base.scores["dual"].deviation == pytest.approx(statistics.stdev([50, 52, 57]))
    assert (base.scores["dual"].mean, base.scores["dual"].deviation) == pytest.approx((53.0, (26 / 2) ** 0.5))
    assert slow.scores["dual"].mean == pytest.approx(54.5) and slow.scores["dual"].count == 2
    # Seeds 0 and 2: 51 - 50 and 58 - 57
    assert (slow.differences["dual"].mean, slow.differences["dual"].deviation) == pytest.approx((1.0, 0.0))
    assert base.differences["dual"].mean == base.differences["dual"].deviation == 0
    assert slow.scores["reranked"].deviation is None and "reranked" not in slow.differences
    assert "match_plus_similarity" not in base.scores
    assert base.seconds.mean == pytest.approx(20.0) and base.steps.mean == 1000
    assert (slow.runs, slow.finished, slow.failures) == (3, 2, {1: "out of memory"})


def test_seconds_of_a_resumed_run_are_not_counted(finished):
    run = finished[0]
    metrics = run.folder / "metrics.json"
    content = metrics.read_text()
    for resume in (False, True):
        script(run, "pass", resume=resume)
    metrics.write_text(content)
    assert summarize(finished)[0].seconds.mean == pytest.approx(25.0)


def test_markdown(finished):
    shown = markdown(summarize(finished), title="study")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "runs", "dual", "match", "reranked", "steps", "seconds"]
    assert rows[2] == ["base", "3/3", "53.0 ± 3.6", "40.0 ± 0.0", "", "1,000", "20"]
    assert rows[3] == ["slow", "2/3", "54.5 ± 4.9", "40.0 ± 0.0", "70.0", "1,000", "20"]
    assert rows[6] == ["slow", "+1.0 ± 0.0", "+0.0 ± 0.0", ""]
    assert "- slow, seed 1: out of memory" in shown and "Not finished" not in shown
    (finished[0].folder / "metrics.json").unlink()
    assert "Not finished: 1 of 6 runs." in markdown(summarize(finished), title="study")


def test_csv(finished):
    base, slow = csv.DictReader(io.StringIO(table_csv(summarize(finished))))
    assert float(base["dual_sd"]) == pytest.approx(13**0.5) and base["match_plus_similarity_mean"] == ""
    assert float(slow["dual_difference_mean"]) == 1.0 and slow["reranked_sd"] == ""
    assert (slow["finished"], slow["failed"], slow["seconds"]) == ("2", "seed 1: out of memory", "20.0")


def test_files(finished, tmp_path):
    write_tables(finished, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {
        f"ablation.{suffix}" for suffix in ("md", "csv", "png")
    }
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "# out" in (tmp_path / "out" / "ablation.md").read_text()


def test_a_table_of_nothing_yet(tmp_path):
    runs = plan(tmp_path)
    write_tables(runs, tmp_path / "out")
    assert "Not finished: 4 of 4 runs." in (tmp_path / "out" / "ablation.md").read_text()
