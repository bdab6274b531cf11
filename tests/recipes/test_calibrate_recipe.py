"""recipes/calibrate.py as its users start it: the weight goes into config.json, and evaluations go by it."""

import json
import shutil

import pytest
import torch
from helpers.recipe_process import call, error_lines, run_here
from helpers.small_karpathy import data, write_small_karpathy

from loopitr import LoopITRModel
from loopitr.evaluation.calibration import WEIGHTS

WHERE = ("--data.split", "test", "--data.max_skipped_fraction", 0.2, "--data.num_workers", 0, "--rerank", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_karpathy(tmp_path_factory.mktemp("calibrate"))


def test_the_fitted_weight_is_kept_and_used(folder, tmp_path, monkeypatch, capsys):
    model = shutil.copytree(folder / "run", tmp_path / "run")
    LoopITRModel.from_pretrained(model, dtype="bfloat16").save_pretrained(model)  # The weights are measured in fp32.
    before = LoopITRModel.from_pretrained(model, dtype="auto")
    assert before.config.similarity_weight == 1.0
    done = run_here(monkeypatch, capsys, "calibrate.py", "--model", model, *data(folder, *WHERE))
    assert done.returncode == 0, done.stderr
    assert "the model was trained on any of these images is unknown" in done.stdout
    assert "images are few to fit a weight on" in done.stderr
    after = LoopITRModel.from_pretrained(model, dtype="auto")
    assert after.dtype == before.dtype == torch.bfloat16
    assert after.config.similarity_weight in WEIGHTS and after.config.similarity_weight != 1.0
    assert all(a.equal(b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))
    output = tmp_path / "metrics.json"
    given = data(folder, *WHERE, "--output", output)
    assert call(monkeypatch, capsys, "evaluate.py", "--model", model, *given)[0] == 0
    figures = json.loads(output.read_text())
    assert figures["similarity_weight"] == after.config.similarity_weight and figures["calibrated"] is False
    assert figures["reranked"]["mean_r1"] >= max(figures[head]["mean_r1"] for head in ("dual", "match"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--rerank", 0], "rerank must be at least 1, got 0"),
        (["--model", "someone/model"], "someone/model is not a local folder"),
        (["--model", "{folder}/images"], "holds no model"),
    ],
)
def test_what_cannot_be_calibrated_is_said_in_one_line(folder, monkeypatch, capsys, changes, message):
    changes = [str(part).format(folder=folder) for part in changes]
    given = ["--model", folder / "run", *data(folder, *WHERE), *changes]
    status, errors = call(monkeypatch, capsys, "calibrate.py", *given)
    assert status == 2 and message in "\n".join(error_lines(errors))
