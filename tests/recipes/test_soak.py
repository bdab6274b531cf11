"""The soak runs, kills, resumes and compares; how many kills a run survives is not tested here."""

import json

import pytest
from helpers.recipe_process import call, error_lines, run_here
from helpers.tiny_run import without_curves
from soak_settings import SETTINGS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "first"),
    [((), "all at once"), (("--ranks", 2), "all at once"), (("--source", "tars"), "stream")],
    ids=["one process", "two ranks", "streams"],
)
def test_a_few_kills(monkeypatch, capsys, tmp_path, more, first):
    streams = {name: [*words, "--train.max_steps=12"] for name, words in SETTINGS["tars"].items()}
    monkeypatch.setitem(SETTINGS, "tars", streams)  # A checkpoint, a validation and two ends of an epoch are in them.
    words = ["--kills", 2, "--images", 32, "--epochs", 1, "--memory_steps", 0, "--folder", tmp_path, *more]
    with without_curves():
        done = run_here(monkeypatch, capsys, "benchmarks/soak.py", *words, "--output", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert sum(sum(tally["kills"].values()) for tally in figures.values()) == 2
    done_runs = [tally for tally in figures.values() if tally["rounds"]]
    assert done_runs and all(tally["equal"] == tally["rounds"] for tally in done_runs)
    assert all(tally["lost"] == tally["doubled"] == 0 for tally in done_runs)
    assert f"| {first} " in done.stdout and "2 kills, during: " in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--kills", 0, "kills must be at least 1, got 0"),
        ("--minutes", -1, "minutes must be at least 0, got -1.0"),
        ("--fsdp", "true", "fsdp needs ranks of at least 2, and the source scenes"),
    ],
)
def test_bad_options_are_one_line(monkeypatch, capsys, option, value, said):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    status, errors = call(monkeypatch, capsys, "benchmarks/soak.py", option, value)
    assert status == 2 and said in error_lines(errors)[0]
