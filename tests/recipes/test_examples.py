"""The examples as their readers start them."""

from __future__ import annotations

import json
import re

from helpers.recipe_process import launch
from helpers.support import tiny_model
from helpers.tiny_gallery import tiny_processor
from PIL import Image


def test_a_term_of_your_own_is_logged_and_learns():
    done = launch("examples/own_term.py")
    assert done.returncode == 0, done.stderr
    values = [float(x) for x in re.findall(r"uniformity (-?[0-9.]+)", done.stdout)]
    assert len(values) == 10 and values[-1] < values[0] - 0.5  # embeds move apart


def test_records_of_your_own_are_trained_on(tmp_path):
    done = launch("examples/own_records.py", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["num_images"] == 16 and metrics["training"]["steps"] == 20
    assert "match + similarity" in (tmp_path / "run" / "results.md").read_text()
    assert "squares" not in (tmp_path / "run" / "config.yaml").read_text()  # the options that were given, no source
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows[-2]["loss/itc"] < rows[0]["loss/itc"]


def test_a_folder_is_ranked_by_match_score(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for index in range(5):
        Image.new("RGB", (40, 30), (50 * index, 90, 200 - 40 * index)).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    done = launch("examples/rank_folder.py", tmp_path / "model", tmp_path / "photos", "a red square")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert sorted(name for name, *_ in lines) == [f"{index}.png" for index in range(5)]
    scores = [float(match.removeprefix("match ")) for _, match, _ in lines]
    assert scores == sorted(scores, reverse=True)
