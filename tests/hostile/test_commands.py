"""Hostile files as a command meets them: it ends with results or with one line, and never with a traceback.

`LOOPITR_HOSTILE_EVERY=2` feeds every second annotation file and tar to the command, which takes long; by default every
thirtieth. All of them are read by the other tests of this folder, without a command.
"""

import json
import os
import signal

import datasets
import pytest
from helpers.hostile_images import hostile_images, picture
from helpers.hostile_tables import GOOD, hostile_tables
from helpers.hostile_tars import hostile_tars
from helpers.recipe_process import error_lines, run_here
from helpers.tiny_building import save_tiny
from helpers.tiny_run import reset_accelerate

SECONDS = 60
EVERY = int(os.environ.get("LOOPITR_HOSTILE_EVERY", 30))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def evaluate(model, monkeypatch, capsys, tmp_path):
    """What a command made of a file: its figures, or None, and its output or its line."""
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    output = tmp_path / "figures.json"

    def evaluate(*words):
        reset_accelerate()
        output.unlink(missing_ok=True)
        signal.alarm(SECONDS)  # of this command; conftest.py turns the alarm off after the test
        given = [
            "--model",
            model,
            "--rerank",
            0,
            "--device",
            "cpu",
            "--data.num_workers",
            0,
            "--check_overlap",
            "false",
        ]
        done = run_here(monkeypatch, capsys, "evaluate.py", *given, "--output", output, *words)
        reset_accelerate()
        lines = error_lines(done.stderr)
        if done.returncode == 0:
            assert not lines
            return json.loads(output.read_text()), done.stdout
        assert done.returncode == 2 and len(lines) == 1 and lines[0].isprintable() and not output.exists()
        return None, lines[0]

    return evaluate


def test_every_image_at_once(evaluate, tmp_path):
    """A table of all images, good ones between them: those that cannot be read are counted."""
    cases = hostile_images(tmp_path / "images")
    rows = [{"image": str(case.path), "caption": f"an image {number}"} for number, case in enumerate(cases)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--data.table", tmp_path / "rows.jsonl", "--data.images", tmp_path / "images"]
    figures, said = evaluate(*given, "--data.max_skipped_fraction", 0.9)
    unreadable = sum(case.readable is False for case in cases)
    readable = sum(case.readable is True for case in cases)
    assert readable <= figures["num_images"] <= len(cases) - unreadable
    assert "skipped" in said
    nothing, line = evaluate(*given, "--data.max_skipped_fraction", 0.1)
    assert nothing is None and "more than the allowed fraction 0.1" in line


def test_annotation_files(evaluate, tmp_path):
    (tmp_path / "images").mkdir()
    for number, name in enumerate([*GOOD, "bad.png"]):
        picture(number).save(tmp_path / "images" / name)
    (tmp_path / "tables").mkdir()
    whole = refused = 0
    for case in list(hostile_tables(tmp_path / "tables"))[::EVERY]:
        given = [f"--data.{case.kind}", case.path, "--data.images", tmp_path / "images", "--data.split", "train"]
        figures, said = evaluate(*given, "--data.max_skipped_fraction", 1.0)
        whole += figures is not None
        refused += figures is None
        if figures is not None:
            assert case.readable is not False and 1 <= figures["num_images"] <= len(GOOD) + 1, case
        else:
            assert case.readable is not True, (case, said)
    print(f"{whole} annotation files evaluated, {refused} refused")
    assert whole > 5 and refused > 5


def test_tars(evaluate, tmp_path):
    evidence = tmp_path / "it ran"
    count = 0
    for number, case in enumerate(list(hostile_tars(evidence))[:: max(1, EVERY // 5)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "train-00000.tar").write_bytes(case.content)
        figures, said = evaluate("--data.hub", folder, "--data.split", "train", "--data.max_skipped_fraction", 1.0)
        if case.lost is None:
            assert figures is None and str(folder) in said, case.name
        elif figures is not None:
            assert figures["num_images"] >= 1 and all(reason in said for reason in case.reasons), case.name
        count += 1
    assert count and not evidence.exists()
