"""recipes/plot_heads.py draws a run's heads, and says in one line what it cannot draw."""

import shutil

import pytest
from helpers.recipe_process import call, error_lines
from helpers.small_karpathy import data, write_small_karpathy
from PIL import Image

WHERE = ("--data.split", "test", "--data.max_skipped_fraction", 0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_karpathy(tmp_path_factory.mktemp("heads"))


def test_it_draws_and_leaves_the_model_as_it_was(folder, tmp_path, monkeypatch, capsys):
    model, output = shutil.copytree(folder / "run", tmp_path / "run"), tmp_path / "heads.png"
    before = (model / "config.json").read_bytes()
    given = data(folder, *WHERE, "--output", output)
    status, errors = call(monkeypatch, capsys, "plot_heads.py", "--model", model, *given)
    assert status == 0, errors
    with Image.open(output) as drawn:
        assert len(drawn.convert("L").getcolors()) > 10
    assert (model / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--rerank", 0), "rerank must be at least 1, got 0"),
        (("--output", "."), "it is a folder"),
        (("--device", "tpu9"), "tpu9"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(folder, monkeypatch, capsys, changes, message):
    given = ("--model", folder / "run", *data(folder, *WHERE), *changes)
    status, errors = call(monkeypatch, capsys, "plot_heads.py", *given)
    assert status != 0 and len(error_lines(errors)) == 1 and message in errors
