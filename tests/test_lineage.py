import json
import shutil

import yaml

from loopitr.lineage import MAX_RUNS, located, runs_of, stamp


def write(path, **groups):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(groups))


def test_the_chain_is_followed_through_best_folders_and_resumed_runs(tmp_path):
    second = tmp_path / "runs" / "second"
    write(second / "config.yaml", model={}, data={"limit": 2})
    write(second / "config.before-00000008.yaml", data={"limit": 1})
    write(second / "config.before-00000002.yaml", model={"init": "runs/first/best"})
    write(tmp_path / "runs" / "first" / "config.yaml", model={"init": "me/model"})
    (tmp_path / "runs" / "first" / "best").mkdir()
    (second / "model").mkdir()
    runs = runs_of(second / "model")
    assert [run.name for run in runs] == [
        str(second / "model"),
        str(tmp_path / "runs" / "first" / "best"),
        "me/model",
    ]
    assert [run.folder for run in runs[:2]] == [second, tmp_path / "runs" / "first"]
    assert [run.start for run in runs] == ["runs/first/best", "me/model", None]
    assert [config.group("data") for config in runs[0].configs] == [{"limit": 2}, {"limit": 1}, {}]
    assert runs[0].config.group("data") == {"limit": 2} and not runs[2].configs and not runs[2].config.content


def test_a_circle_ends(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        write(tmp_path / name / "config.yaml", model={"init": str(tmp_path / other)})
    runs = runs_of(tmp_path / "a")
    assert len(runs) == MAX_RUNS and runs[-1].start == str(tmp_path / "a")


def test_a_damaged_config_is_named(tmp_path):
    for text, error in (("- 1", "holds no options"), ("{", "is damaged"), ("a: 2001-99-99", "is damaged")):
        (tmp_path / "config.yaml").write_text(text)
        (run,) = runs_of(tmp_path)
        assert error in str(run.config.error) and run.config.group("model") == {} and run.start is None, text


def test_paths_are_looked_for_from_here_then_from_the_parents_of_the_run(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (tmp_path / "a.csv").touch()
    assert located("a.csv", run) == str(tmp_path / "a.csv")
    monkeypatch.chdir(tmp_path)
    assert located("a.csv", run) == "a.csv" and located("gone.csv", run) == "gone.csv"


def test_a_run_is_found_where_it_was_moved_and_not_taken_for_the_one_in_its_place(tmp_path):
    runs, first = tmp_path / "runs", {"table": "one.csv", "limit": None}
    write(runs / "x" / "config.yaml", data=first, model={})
    write(runs / "second" / "config.yaml", model={"init": str(runs / "x")}, data={"table": "two.csv"})
    (runs / "second" / "data.json").write_text(json.dumps({"train": None, "start": stamp(runs / "x" / "best")}))

    def tables():
        return [[config.group("data").get("table") for config in run.configs] for run in runs_of(runs / "second")]

    assert tables() == [["two.csv"], ["one.csv"]]
    write(runs / "x" / "config.yaml", data={"table": "one.csv", "new": None}, model={})  # rewritten by a later version
    assert tables() == [["two.csv"], ["one.csv"]]
    (runs / "x").rename(runs / "x.1")
    write(runs / "x" / "config.yaml", data={"table": "three.csv"}, model={})
    assert tables() == [["two.csv"], ["one.csv"]]
    shutil.rmtree(runs / "x.1")
    assert tables() == [["two.csv"], []]
    assert runs_of(runs / "second")[-1].missing == "another run has taken its place"
    # A run that replaced the one that it started from.
    write(runs / "second" / "config.yaml", model={"init": str(runs / "second")}, data={"table": "four.csv"})
    (runs / "second" / "data.json").unlink()
    assert tables() == [["four.csv"], []]
