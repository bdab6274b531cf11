"""What a run leaves behind can be read back, whatever moment it was killed at."""

import json

import numpy as np
import pytest
from PIL import Image

from loopitr.training.reporting import HISTORY, History, plot_curves, read_history, write_json


def test_history_is_one_json_line_per_row_and_read_back(tmp_path):
    history = History(tmp_path)
    history.add(1, {"loss/total": 2.5})
    history.add(2, {"loss/total": 2.0, "val/dual": 40.0})
    expected = [{"step": 1, "loss/total": 2.5}, {"step": 2, "loss/total": 2.0, "val/dual": 40.0}]
    assert [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()] == expected
    assert read_history(tmp_path) == history.rows == expected


def test_a_new_history_forgets_the_old_one(tmp_path):
    History(tmp_path).add(1, {"loss/total": 2.5})
    History(tmp_path)
    assert read_history(tmp_path) == []


def test_a_resumed_history_keeps_the_rows_of_its_checkpoint(tmp_path):
    """Also where the checkpoint was followed by a validation at the same step, which will be done again."""
    first = History(tmp_path)
    for step in (1, 2, 3):
        first.add(step, {"loss/total": float(step)})
    first.add(2, {"val/dual": 10.0})
    resumed = History(tmp_path, keep=2)
    resumed.add(3, {"loss/total": 30.0})
    assert read_history(tmp_path) == [
        {"step": 1, "loss/total": 1.0},
        {"step": 2, "loss/total": 2.0},
        {"step": 3, "loss/total": 30.0},
    ]


def test_a_torn_last_line_is_ignored(tmp_path):
    History(tmp_path).add(1, {"loss/total": 2.5})
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"step": 2, "loss/to')
    assert read_history(tmp_path) == [{"step": 1, "loss/total": 2.5}]
    assert read_history(tmp_path / "absent") == []


def test_json_is_complete_or_not_there(tmp_path):
    write_json(tmp_path / "metrics.json", {"a": [1, 2]})
    with pytest.raises(TypeError):
        write_json(tmp_path / "metrics.json", {"a": object()})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_curves_show_losses_left_and_recall_right(tmp_path):
    def ink(rows):
        """Coloured pixels of the left and of the right half."""
        plot_curves(rows, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as image:
            image.verify()
        with Image.open(tmp_path / "curves.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        coloured = pixels.max(2) - pixels.min(2) > 60
        half = pixels.shape[1] // 2
        return coloured[:, :half].sum(), coloured[:, half:].sum()

    losses = [{"step": i, "loss/itc": 3.0 - i, "loss/itm": 0.5, "train/lr": 9.0} for i in range(3)]
    recalls = [{"step": 2, "val/dual": 20.0, "val/match": 30.0}]
    assert ink([]) == (0, 0)
    left, right = ink(losses)
    assert left > 100 and right == 0
    left, right = ink(recalls)
    assert left == 0 and right > 20
    left, right = ink(losses + recalls)
    assert left > 100 and right > 20
