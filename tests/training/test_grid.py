"""Grids of runs: what a file says, and how far its runs have come. Nothing is trained."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from helpers.small_grids import ROWS, finish, parse_run, plan, write_grid

from loopitr.training.grid import Progress, plan_runs, progress_of, read_grid

GRIDS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "configs" / "ablations").glob("*.yaml"))


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
        ({"seeds": [1, 1]}, "a seed occurs twice"),
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
