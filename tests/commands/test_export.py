"""`loopitr export`: each form through the command line, and its mistakes in one line."""

import json
import sys

import pytest
from helpers.recipe_process import call, error_lines
from helpers.support import BERT, tiny_model
from helpers.tiny_gallery import tiny_processor
from sentence_transformers import SentenceTransformer

import loopitr.export.onnx as exporting
from loopitr import DualEncoder, TextTower
from loopitr.commands.main import main
from loopitr.models.processing import LoopITRProcessor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    tiny_model(text={**BERT, "num_hidden_layers": 1}, layers=1).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        main(["export", *map(str, arguments)])
    assert raised.value.code == 2
    (line,) = error_lines(capsys.readouterr().err)
    return line


def test_transformers_is_the_default(run, tmp_path, capsys):
    main(["export", str(run), str(tmp_path / "dual")])
    assert capsys.readouterr().out == f"dual encoder with 0.0M parameters in {tmp_path}/dual\n"
    assert DualEncoder.from_pretrained(tmp_path / "dual")
    main(["export", str(run), "--output", str(tmp_path / "text"), "--tower", "text"])
    assert capsys.readouterr().out.startswith("text tower with ")
    assert TextTower.from_pretrained(tmp_path / "text")


def test_sentence_transformers(run, tmp_path, capsys):
    main(["export", str(run), str(tmp_path / "st"), "--to", "sentence-transformers"])
    shown = capsys.readouterr().out
    assert (
        shown.startswith(f"SentenceTransformer in {tmp_path}/st; largest difference")
        and "st/README.md has the line that converts them" in shown
    )
    assert SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(["a red circle"]).shape == (1, 16)


@pytest.mark.slow
def test_onnx_with_the_recall_of_each_precision(run, tmp_path, monkeypatch, capsys):
    given = [
        "--model",
        run,
        "--output",
        tmp_path / "onnx",
        "--to",
        "onnx",
        "--precisions",
        "[int8]",
        "--recall",
    ]
    given += ["--data.scenes", "true", "--data.scenes_val", 8, "--data.num_workers", 0, "--rerank", 3]
    status, errors = call(monkeypatch, capsys, "export_dual.py", *given)
    assert status == 0, errors
    assert json.loads((tmp_path / "onnx" / "onnx_config.json").read_text())["precisions"] == ["fp32", "int8"]
    assert sorted(path.name for path in (tmp_path / "onnx").glob("*.onnx")) == [
        *("fusion_head.onnx", "fusion_head_int8.onnx", "image_tower.onnx", "image_tower_int8.onnx"),
        *("text_tower.onnx", "text_tower_int8.onnx"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "required: output"),
        (["{run}", "{tmp}/out", "again"], "again"),
        (["{run}", "{tmp}/out", "--to", "coreml"], "coreml"),
        (["{run}", "{tmp}/out", "--tower", "audio"], "audio"),
        (["{run}", "{tmp}/out", "--recall", "true"], "recall needs --to onnx, got --to transformers"),
        (["{run}", "{tmp}/out", "--precisions", "[int8]"], "precisions needs --to onnx"),
        (["{run}", "{tmp}/out", "--to", "onnx", "--precisions", "[int4]"], "int4"),
        (["{run}", "{tmp}/out", "--to", "onnx", "--recall", "true", "--tower", "text"], "recall needs both towers"),
        (["{run}", "{tmp}/out", "--to", "onnx", "--rerank", "-1"], "rerank must be at least 0, got -1"),
        (["{tmp}/none", "{tmp}/out", "--to", "onnx"], "no model folder {tmp}/none"),
        (["{tmp}", "{tmp}/out", "--to", "sentence-transformers"], "{tmp} holds no model"),
        (["{run}", "{run}", "--to", "onnx"], "{run} exists and is not empty; choose another folder"),
        (["{run}", "{run}", "--tower", "text"], "holds a 'loopitr' model, which would be overwritten"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line(run, tmp_path, capsys, arguments, message):
    line = fails(capsys, *(word.format(run=run, tmp=tmp_path) for word in arguments))
    assert message.format(run=run, tmp=tmp_path) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "missing"), [("onnx", "onnxruntime"), ("sentence-transformers", "sentence_transformers")]
)
def test_an_extra_that_is_missing(run, tmp_path, capsys, monkeypatch, to, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(exporting, "read_source", None)  # It is said before the model is read.
    assert f'pip install "loopitr[{to}]"' in fails(capsys, run, tmp_path / "out", "--to", to)
    assert not [*tmp_path.iterdir()]


def test_a_damaged_model(run, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "run")
    LoopITRProcessor.from_pretrained(run).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"cut off")
    for more in ([], ["--tower", "text"], ["--to", "onnx"], ["--to", "sentence-transformers", "--tower", "image"]):
        assert "damaged" in fails(capsys, tmp_path / "run", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
