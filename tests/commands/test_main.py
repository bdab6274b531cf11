"""The console script `loopitr`: its subcommands do what the recipes of the same names do."""

import configparser
import importlib
import json
import shutil

import pytest
import torch
from fixtures.albef_tiny.plain import FOLDER
from helpers.recipe_process import ROOT, call, error_lines, started
from helpers.small_karpathy import data, write_small_karpathy

import loopitr
from loopitr import DualEncoder, LoopITRModel
from loopitr.commands.main import COMMANDS, main

WHERE = ("--data.split", "test", "--data.max_skipped_fraction", 0.2, "--data.num_workers", 0, "--rerank", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_karpathy(tmp_path_factory.mktemp("commands"))


def fails(capsys, *arguments):
    """The one line that `loopitr arguments` ends with."""
    with pytest.raises(SystemExit) as raised:
        main([str(word) for word in arguments])
    assert raised.value.code == 2
    (line,) = error_lines(capsys.readouterr().err)
    return line


def test_help_has_a_line_for_each_command_and_does_without_torch():
    *shown, imported = started("--help")
    assert imported == "[]"
    lines = [line.split(maxsplit=1) for line in shown if line.startswith("  ") and not line.startswith("  --")]
    assert lines == [[name, command.line] for name, command in COMMANDS.items()]
    assert [*COMMANDS] == ["search", "evaluate", "calibrate", "export", "convert"]


@pytest.mark.parametrize(
    ("name", "option"),
    [("evaluate", "--rerank"), ("calibrate", "--rerank"), ("export", "--output"), ("convert", "albef|blip")],
)
def test_help_of_a_command_does_without_torch(name, option):
    *shown, imported = started(name, "--help")
    assert imported == "[]" and shown[0].startswith(f"usage: loopitr {name} ")
    assert any(option in line for line in shown)


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"loopitr {loopitr.__version__}\n"


def test_the_installed_script_is_this_one():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "loopitr" and getattr(importlib.import_module(module), function) is main
    assert setup["metadata"]["version"] == loopitr.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command is given; known: search, evaluate, calibrate, export, convert"),
        (["train"], "unknown command 'train'; known: search, evaluate"),
        (["--model", "run"], "unknown command '--model'"),
        (["evaluate"], "required: model"),
        (["evaluate", "--nonsense"], "--nonsense"),
        (["evaluate", "{tmp}/none"], "no model folder {tmp}/none"),
        (["calibrate", "{tmp}/none", "--data.scenes", "true"], "no model folder {tmp}/none"),
        (["evaluate", "--model", "x", "--gallery", "{tmp}"], "{tmp} cannot be written: it is a folder"),
        (["evaluate", "--model", "x", "--gallery", "a", "--output", "./a"], "output and gallery are the same file"),
        (
            ["evaluate", "--model", "x", "--gallery", "a", "--gallery_queries", "0"],
            "gallery_queries must be at least 1",
        ),
        (["calibrate", "--model", "x", "--output", "a"], "--output"),
        (["calibrate", "--model", "{tmp}", "--rerank", "0"], "rerank must be at least 1, got 0"),
        (["export", "--model", "{tmp}/none", "--output", "{tmp}/out"], "no model folder {tmp}/none"),
        (["convert", "clip", "a", "b"], "clip"),
        (["convert", "albef", "{tmp}/none.pth", "{tmp}/out"], "no checkpoint file {tmp}/none.pth"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert message.format(tmp=tmp_path) in fails(capsys, *(word.format(tmp=tmp_path) for word in arguments))
    assert not (tmp_path / "out").exists()


def test_evaluate_gives_the_recipes_figures(folder, tmp_path, monkeypatch, capsys):
    given = ["--model", folder / "run", *data(folder, *WHERE)]
    assert call(monkeypatch, capsys, "evaluate.py", *given, "--output", tmp_path / "recipe.json")[0] == 0
    main(["evaluate", *map(str, given), "--output", str(tmp_path / "command.json")])
    assert "| dual " in capsys.readouterr().out
    figures = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("recipe", "command")]
    for each in figures:
        del each["seconds"], each["pairs_per_second"]
    assert figures[0] == figures[1]


def test_evaluate_writes_a_gallery(folder, tmp_path, capsys):
    given = ["--model", folder / "run", *data(folder, *WHERE), "--gallery_queries", 3]
    main(["evaluate", *map(str, given), "--gallery", str(tmp_path / "new" / "page.html")])
    assert f"gallery in {tmp_path}/new/page.html" in capsys.readouterr().out
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.count("<section") == 6 and "data:image/jpeg" in page and f"{folder}/run: test" in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_calibrate_keeps_the_weight(folder, tmp_path, capsys):
    model = shutil.copytree(folder / "run", tmp_path / "run")
    main(["calibrate", "--model", str(model), *map(str, data(folder, *WHERE))])
    assert "similarity weight: " in capsys.readouterr().out
    assert LoopITRModel.from_pretrained(model).config.similarity_weight != 1.0


def test_export_writes_the_dual_encoder(folder, tmp_path, capsys):
    main(["export", "--model", str(folder / "run"), "--output", str(tmp_path / "dual")])
    assert capsys.readouterr().out == f"dual encoder with 0.1M parameters in {tmp_path}/dual\n"
    dual, model = DualEncoder.from_pretrained(tmp_path / "dual"), LoopITRModel.from_pretrained(folder / "run")
    ids = torch.tensor([[2, 7, 3]])
    assert torch.equal(dual.eval().get_text_features(ids), model.eval().get_text_features(ids))


def test_convert_writes_a_model(tmp_path, capsys):
    heads = ["--vision-heads", "3", "--text-heads", "2"]
    main(["convert", "albef", str(FOLDER / "weights.safetensors"), str(tmp_path), *heads])
    assert capsys.readouterr().out.startswith("albef with ")
    assert LoopITRModel.from_pretrained(tmp_path)
    with pytest.raises(SystemExit) as raised:
        main(["convert", "--help"])
    assert raised.value.code == 0 and capsys.readouterr().out.startswith("usage: loopitr convert ")
