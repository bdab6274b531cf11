"""What recipes/evaluate.py is about when its data have no splits, and whether the model was trained on them."""

import json

import pytest
from helpers.recipe_process import call
from helpers.tiny_gallery import captions, jpeg
from helpers.tiny_run import reset_accelerate, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`run/`, trained on `train.csv`, which has no splits; `test.csv` has other images and one of these."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "images").mkdir()
    for i in range(44):
        (folder / "images" / f"{i}.jpg").write_bytes(jpeg(i % 41))  # 41 to 43 are copies of 0 to 2
    for name, numbers in (("train", range(32)), ("test", range(32, 44))):
        rows = "".join(f"{i}.jpg,{captions(i, 1)[0]}\n" for i in numbers)
        (folder / f"{name}.csv").write_text("image,caption\n" + rows)
    given = {"data__table": str(folder / "train.csv"), "data__images": str(folder / "images")}
    run(folder, **given, data__val_fraction=0.2, train__max_steps=1)
    return folder


def evaluate(folder, monkeypatch, capsys, table, *more):
    output = folder / "metrics.json"
    given = ["--data.table", folder / table, "--data.images", folder / "images", "--data.num_workers", 0]
    given += ["--model", folder / "run", "--rerank", 0, "--device", "cpu", "--output", output, *more]
    reset_accelerate()
    monkeypatch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
    lines: list[str] = []
    status, errors = call(monkeypatch, capsys, "evaluate.py", *given)
    monkeypatch.undo()
    assert status == 0, errors
    return json.loads(output.read_text()), lines


@pytest.mark.slow
def test_a_separate_file_is_evaluated_whole_and_trained_images_in_it_are_named(folder, monkeypatch, capsys):
    figures, lines = evaluate(folder, monkeypatch, capsys, "test.csv")
    assert figures["num_images"] == 12
    shared = figures["trained_on"]
    assert 0 < shared["count"] <= 3 and set(shared["images"]) <= {"41.jpg", "42.jpg", "43.jpg"}
    assert any(line.startswith(f"warning: {shared['count']} of the 12 images were trained on: ") for line in lines)


def test_the_runs_own_table_gives_what_the_run_held_out(folder, monkeypatch, capsys):
    of_run = json.loads((folder / "run" / "metrics.json").read_text())
    figures, lines = evaluate(folder, monkeypatch, capsys, "train.csv")
    assert 0 < figures["num_images"] == of_run["num_images"] < 32
    assert figures["dual"] == of_run["dual"]
    assert any("this run was trained on it" in line for line in lines)
    assert figures["trained_on"] == {"count": 0, "images": [], "unknown": None}
