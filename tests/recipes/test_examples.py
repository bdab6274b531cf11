"""The examples in recipes/examples run in seconds and do what they show."""

import json
import math

import pytest
from helpers.recipe_process import call, run_here
from helpers.support import tiny_model
from helpers.tiny_gallery import jpeg, tiny_processor
from helpers.tiny_run import reset_accelerate

from loopitr import LoopITRModel
from loopitr.training.reporting import read_history


@pytest.fixture(autouse=True)
def _accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def test_a_term_of_ones_own_is_trained_and_logged(tmp_path, monkeypatch, capsys):
    given = ["--output_dir", tmp_path / "run", "--steps", 3, "--weight", 0.5]
    assert call(monkeypatch, capsys, "examples/own_term.py", *given)[0] == 0
    rows = [row for row in read_history(tmp_path / "run") if "loss/total" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert -8 < row["loss/uniformity"] <= 0 and 0 <= row["train/closest"] < 2
        total = row["loss/itc"] + row["loss/itm"] + 0.5 * row["loss/uniformity"]
        assert math.isclose(row["loss/total"], total, rel_tol=1e-4)


def test_a_list_of_records_is_trained_on(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, capsys, "examples/own_records.py", "--output_dir", tmp_path / "run", "--steps", 3)[0] == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["num_images"], metrics["num_captions"], metrics["training"]["steps"]) == (16, 32, 3)
    assert metrics["training"]["skipped"] == {}
    assert LoopITRModel.from_pretrained(tmp_path / "run").config.vision["name"] == "test_vit"


def test_a_folder_is_ranked_by_match_score(monkeypatch, capsys, tmp_path):
    for part in (tiny_model(), tiny_processor()):
        part.save_pretrained(tmp_path / "run")
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "images" / "notes.txt").write_text("no image")
    given = ["--model", tmp_path / "run", "--images", tmp_path / "images", "--query", "a red circle"]
    ranked = {}
    for count in (3, 8):
        done = run_here(monkeypatch, capsys, "examples/rank_folder.py", *given, "--rerank", count)
        assert done.returncode == 0, done.stderr
        ranked[count] = [line.split("\t") for line in done.stdout.splitlines()]
        matches = [float(match) for _, _, match in ranked[count]]
        assert matches == sorted(matches, reverse=True) and len(set(matches)) > 1
    assert sorted(path for path, _, _ in ranked[8]) == [str(tmp_path / "images" / f"{n}.jpg") for n in range(5)]
    nearest = sorted(ranked[8], key=lambda row: -float(row[1]))[:3]
    assert sorted(path for path, _, _ in ranked[3]) == sorted(path for path, _, _ in nearest)


def test_an_empty_folder_is_one_line(tmp_path, monkeypatch, capsys):
    given = ["--model", tmp_path / "run", "--images", tmp_path, "--query", "a red circle"]
    status, errors = call(monkeypatch, capsys, "examples/rank_folder.py", *given)
    assert (status, errors) == (2, f"error: no images in {tmp_path}\n")
