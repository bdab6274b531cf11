"""Grids of runs: what a file says, how far its runs have come, what the table makes of them. Nothing is trained."""

import csv
import dataclasses
import io
import json
import signal
import statistics
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from helpers.tiny_run import write_config

from loopitr.cli import parse
from loopitr.training.grid import Progress, plan_runs, progress_of, read_grid
from loopitr.training.grid_running import attempts, execute, failure
from loopitr.training.grid_table import markdown, summarize, table_csv, write_tables
from loopitr.training.options import PretrainOptions

GRIDS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "configs" / "ablations").glob("*.yaml"))
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


def test_every_row_has_every_seed_and_a_folder_of_its_own(tmp_path):
    runs = plan(tmp_path)
    assert [(run.row, run.seed) for run in runs] == [("base", 0), ("slow", 0), ("base", 1), ("slow", 1)]
    assert [(run.row, run.seed) for run in plan(tmp_path, by_row=True)][:2] == [("base", 0), ("base", 1)]
    slow = runs[3]
    assert slow.folder == tmp_path / "out" / "slow" / "seed-1"
    assert (slow.options.train.seed, slow.options.train.lr) == (1, 1e-5)
    assert runs[0].options.train.lr == 1e-3 and runs[0].options.data.scenes_train == 64  # of the base


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.lr": 0.25, "model.freeze": ["vision", "text"], "model.vision.kwargs": {"stem_width": 4}},
        ["--train.lr 0.25", "--model.freeze [vision, text]", '--model.vision.kwargs={"stem_width": 4}'],
        ["--train.lr", 0.25, "--model.freeze=[vision,text]", "--model.vision.kwargs", {"stem_width": 4}],
    ],
    ids=["mapping", "words", "pairs"],
)
def test_overrides_in_three_ways(tmp_path, overrides):
    options = plan(tmp_path, rows=[{"name": "one", "overrides": overrides}])[0].options
    assert (options.train.lr, options.model.freeze) == (0.25, ["vision", "text"])
    assert options.model.vision.kwargs == {"stem_width": 4}


def test_rows_go_over_the_command_line_which_goes_over_the_base(tmp_path):
    rows = [{"name": "base"}, {"name": "one", "overrides": {"train.epochs": 5}}]
    base = {"config": "tiny.yaml", "overrides": {"train.epochs": 3, "train.clip": 2.0, "train.warmup": 0.5}}
    extra = ["--train.epochs", "4", "--train.clip=3"]
    of = {run.row: run.options.train for run in plan(tmp_path, base=base, rows=rows, seeds=[7], extra=extra)}
    assert [(t.epochs, t.clip, t.warmup, t.batch_size) for t in of.values()] == [(4, 3.0, 0.5, 8), (5, 3.0, 0.5, 8)]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_grids_that_come_with_the_package(path, tmp_path):
    grid = read_grid(path)
    runs = plan_runs(grid, tmp_path, parse_run)
    assert len(runs) == len(grid.rows) * len(grid.seeds) >= 12
    bare = [dataclasses.replace(r.options, train=dataclasses.replace(r.options.train, output_dir="")) for r in runs]
    assert all(a != b for i, a in enumerate(bare) for b in bare[:i])  # no row says what another says


def test_there_are_grids():
    assert {"scenes", "flickr8k"} <= {path.stem for path in GRIDS}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"rows": []}, "rows must be a list"),
        ({"rows": {"base": []}}, "rows must be a list"),
        ({"rows": ["base"]}, "a row must be a mapping of a name and overrides, got 'base'"),
        ({"rows": [{"name": "a", "override": []}]}, "a row must be a mapping of a name and overrides"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "two rows are named 'a'"),
        ({"rows": [{"name": "a/b"}]}, "'a/b' cannot name a row"),
        ({"rows": [{"name": ".."}]}, "'..' cannot name a row"),
        ({"rows": [{"name": "ablation.md"}]}, "'ablation.md' cannot name a row"),
        ({"rows": [{"name": "a", "overrides": "--train.lr 1"}]}, "row 'a': overrides must be a list or a mapping"),
        ({"rows": [{"name": "a", "overrides": {"train.seed": 1}}]}, "row 'a': --train.seed cannot be given here"),
        ({"rows": [{"name": "a", "overrides": ["--resume"]}]}, "row 'a': --resume cannot be given here"),
        ({"base": {"config": "tiny.yaml", "overrides": ["--train.output_dir x"]}}, "base: --train.output_dir cannot"),
        ({"base": {"path": "tiny.yaml"}}, "base must be a path, or a mapping of config and overrides"),
        ({"seeds": 3}, "seeds must be a list of integers >= 0, got 3"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": [True]}, "seeds must be a list"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"lines": []}, "must be a mapping of base, seeds and rows"),
    ],
)
def test_a_wrong_grid_is_one_line_that_names_the_culprit(tmp_path, tree, message):
    path = write_grid(tmp_path, **tree)
    with pytest.raises(ValueError, match=r"grid\.yaml") as raised:
        read_grid(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_no_grid(tmp_path):
    for content in (b"rows: [", b"\xff\xfe", b"", b"- a"):
        (tmp_path / "grid.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=r"grid\.yaml"):
            read_grid(tmp_path / "grid.yaml")
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        read_grid(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"objective.mlmm": 0}, "objective.mlmm"),
        ({"objective.num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"train.lr": "fast"}, "train.lr"),
        (["loud"], "loud"),
    ],
)
def test_an_option_that_no_run_can_have_names_the_row(tmp_path, overrides, named):
    with pytest.raises(ValueError, match="row 'wrong': .*") as raised:
        plan(tmp_path, rows=[*ROWS, {"name": "wrong", "overrides": overrides}])
    assert named in str(raised.value)


def test_the_grid_says_seed_and_folder_also_after_the_dashes(tmp_path):
    with pytest.raises(ValueError, match="after --: --train.seed cannot be given"):
        plan(tmp_path, extra=["--train.seed=3"])


def test_how_far_a_run_has_come(tmp_path):
    run = plan(tmp_path)[0]
    assert progress_of(run, parse_run) is Progress.NEW
    finish(run)
    assert progress_of(run, parse_run) is Progress.FINISHED
    (run.folder / "metrics.json").unlink()
    assert progress_of(run, parse_run) is Progress.HALF
    (run.folder / "config.yaml").write_text("")  # killed while it wrote
    assert progress_of(run, parse_run) is Progress.NEW


def test_options_that_are_newer_than_a_run_have_their_defaults_there(tmp_path):
    run = plan(tmp_path)[0]
    finish(run)
    tree = dataclasses.asdict(run.options)
    tree["resume"] = True  # as a resumed run writes
    del tree["objective"]["hard_rule"]
    (run.folder / "config.yaml").write_text(yaml.safe_dump(tree))
    assert progress_of(run, parse_run) is Progress.FINISHED


def test_what_a_run_decides_by_itself_is_no_change(tmp_path):
    undecided = {"objective.mlm": None, "objective.agreement": None, "objective.distillation": None}
    run = plan(tmp_path, rows=[{"name": "base", "overrides": {**undecided, "model.fusion.agreement": 8}}])[0]
    finish(run)
    decided = run.options.decided()
    assert run.options.objective.agreement is None and decided.objective.agreement == 1.0
    (run.folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(decided)))  # as a run writes
    assert progress_of(run, parse_run) is Progress.FINISHED


@pytest.mark.parametrize("finished", [True, False])
def test_changed_options_are_refused(tmp_path, finished):
    finish(plan(tmp_path)[1])
    changed = plan(tmp_path, rows=[ROWS[0], {"name": "slow", "overrides": {"train.lr": 0.5}}])[1]
    if not finished:
        (changed.folder / "metrics.json").unlink()
    with pytest.raises(ValueError, match="row 'slow': .*seed-0 was trained with train.lr 1e-05, the grid has 0.5"):
        progress_of(changed, parse_run)


def test_a_recorded_option_that_is_no_more_is_refused(tmp_path):
    run = plan(tmp_path)[0]
    finish(run)
    (run.folder / "config.yaml").write_text("train: {speed: 3}\n")
    with pytest.raises(ValueError, match="row 'base': .*cannot be compared.*speed"):
        progress_of(run, parse_run)


# Processes


def script(run, text, *, resume=False):
    """A program in the place of `pretrain.py`."""
    return execute(run, [sys.executable, "-c", text], resume=resume)


def test_a_run_is_given_its_options_and_logs(tmp_path):
    run = plan(tmp_path)[1]
    assert script(run, "import sys; print(*sys.argv[1:])") == 0
    assert f"--config={run.config}\n" in run.log.read_text() and "--resume" not in run.log.read_text()
    assert parse_run([f"--config={run.config}"]) == run.options
    script(run, "print('on')", resume=True)
    assert "--resume" in run.log.read_text() and attempts(run) == 2
    script(run, "print('anew')")
    assert attempts(run) == 1 and "on\n" not in run.log.read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise KeyError('word')", "KeyError: 'word'"),
        ("import sys; print('error: no data\\nlater', file=sys.stderr); sys.exit(2)", "no data"),
        ("print('step 1\\rstep 2', end=''); exit(3)", "step 2"),
        ("exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
    ],
)
def test_why_a_run_failed(tmp_path, text, reason):
    run = plan(tmp_path)[0]
    script(run, "print('error: an earlier attempt'); exit(2)")
    assert script(run, text, resume=True) not in (0, None)
    assert failure(run) == reason
    finish(run)
    assert failure(run) is None


def test_a_run_that_was_interrupted_has_not_failed(tmp_path):
    run = plan(tmp_path)[0]

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            script(run, "import time; time.sleep(600)")  # would outlast the test
    finally:
        signal.signal(signal.SIGALRM, before)
    assert failure(run) is None and attempts(run) == 1
    assert script(run, "print('free')", resume=True) == 0  # the first process and its lock are gone


def test_two_processes_are_not_at_one_run(tmp_path):
    run = plan(tmp_path)[0]
    inner = f"""
import sys
sys.path[:0] = {sys.path!r}
from functools import partial
from pathlib import Path
from loopitr.cli import parse
from loopitr.training.grid import plan_runs, read_grid
from loopitr.training.grid_running import execute
from loopitr.training.options import PretrainOptions
runs = plan_runs(read_grid(Path({str(tmp_path / "grid.yaml")!r})), Path({str(tmp_path / "out")!r}),
                 partial(parse, PretrainOptions))
execute(runs[0], ["false"], resume=True)
"""
    assert script(run, inner) == 1
    assert failure(run) == f"ValueError: row 'base': another process is at {run.folder}; wait for it or end it"


# Tables

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
