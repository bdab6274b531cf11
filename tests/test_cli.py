"""Options from YAML and dotted overrides; mistakes in one line."""

import re
import runpy
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import yaml
from helpers.tiny_run import OPTIONS, tiny_options, write_config

from loopitr.cli import parse, run
from loopitr.commands import main as commands
from loopitr.commands.export import ExportOptions
from loopitr.commands.search_options import IndexOptions
from loopitr.training.options import PretrainOptions, TrainOptions, ValidationOptions

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.py"))
CONFIGS = sorted((Path(__file__).resolve().parents[1] / "recipes" / "configs").glob("*.yaml"))


def test_defaults_are_those_of_the_dataclasses():
    assert parse(PretrainOptions, []) == PretrainOptions()


def test_dotted_options_go_over_yaml_files_over_defaults(tmp_path):
    config = write_config(tmp_path)
    options = parse(
        PretrainOptions,
        [
            f"--config={config}",
            "--train.lr",
            "2e-4",
            "--model.freeze=[vision,text]",
            "--data.limit=7",
            "--model.vision.kwargs.stem_width=4",
            "--objective.distillation_loss",
            "kl",
        ],
    )
    assert options.train.lr == 2e-4 and options.train.backbone_lr == 1e-3  # 1e-3 in YAML is a text to some readers
    assert options.model.freeze == ["vision", "text"]
    assert options.data.limit == 7 and options.data.scenes_train == 64
    assert options.model.vision.kwargs == {**OPTIONS["model"]["vision"]["kwargs"], "stem_width": 4}
    assert options.objective.distillation_loss == "kl"
    assert options.train.clip == TrainOptions().clip


def test_a_second_file_goes_over_the_first(tmp_path):
    config = write_config(tmp_path)
    (tmp_path / "more.yaml").write_text("train: {epochs: 7}\n")
    options = parse(PretrainOptions, [f"--config={config}", f"--config={tmp_path / 'more.yaml'}"])
    assert (options.train.epochs, options.train.batch_size) == (7, 8)


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "true"], True),
        (["--resume=false"], False),
        (["--resume", "--train.seed", "3"], True),
        (["--train.seed", "3", "--resume", "false"], False),
    ],
)
def test_resume_needs_no_value(arguments, resume):
    assert parse(PretrainOptions, arguments).resume is resume


def test_resume_with_changes_needs_no_value():
    assert parse(PretrainOptions, ["--resume_with_changes", "--train.seed", "3"]).resume_with_changes
    assert not parse(PretrainOptions, ["--resume"]).resume_with_changes


def test_a_written_config_is_read_back_to_the_same_options(tmp_path):
    options = tiny_options(tmp_path, data__data_files={"train": "a-*.tar", "val": "b.tar"}, model__freeze=["vision"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(asdict(options), sort_keys=False))
    assert parse(PretrainOptions, [f"--config={path}"]) == options


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_file_parses_and_says_something(path):
    options = parse(PretrainOptions, [f"--config={path}"])
    assert options != PretrainOptions()
    assert options.train.output_dir == f"runs/{path.stem}"


def test_there_are_config_files():
    assert {"scenes.yaml", "flickr8k.yaml"} <= {path.name for path in CONFIGS}


def test_print_config_is_a_config(tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(PretrainOptions, ["--train.epochs=3", "--print_config"])
    assert raised.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse(PretrainOptions, [f"--config={tmp_path / 'printed.yaml'}"]).train.epochs == 3


def help_of(capsys, options, *words):
    with pytest.raises(SystemExit) as raised:
        parse(options, words, description="Trains a model.")
    assert raised.value.code == 0
    return capsys.readouterr().out


def names(tree, prefix=""):
    """The dotted names of all options of a dataclass's dictionary."""
    for name, value in tree.items():
        nested = isinstance(value, dict) and name not in ("kwargs", "data_files")
        yield from names(value, f"{prefix}{name}.") if nested else [prefix + name]


def test_help_fits_two_screens_and_names_every_option(capsys):
    shown = help_of(capsys, PretrainOptions, "--help")
    assert shown.count("\n") <= 100 and help_of(capsys, PretrainOptions, "--train.lr=1", "-h") == shown
    text = " ".join(shown.split())
    assert "Trains a model." in text and "Continue from the newest checkpoint" in text
    assert "Peak learning rate" not in text
    listed = {
        f"{group}.{name.strip()}"
        for group, inside in re.findall(r"--([\w.]+)\.{([^}]*)}", text)
        for name in inside.split(",")
    }
    assert {*names(asdict(PretrainOptions()))} == listed | {"resume", "resume_with_changes"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_help_of_every_recipe_fits_two_screens(path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
    assert 0 < capsys.readouterr().out.count("\n") <= 100


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "export", "convert", "search index", "search query"])
def test_help_of_every_command_fits_two_screens(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as raised:
        commands.main([*command.split(), "--help"])
    assert not raised.value.code
    assert 0 < capsys.readouterr().out.count("\n") <= 100


def test_help_of_a_group_tells_what_its_options_mean(capsys):
    train, vision, model = (help_of(capsys, PretrainOptions, "--help", g) for g in ("train", "model.vision", "model"))
    assert "Peak learning rate of the two backbones" in " ".join(train.split())
    assert "--train.lr " in train and "--data.table" not in train and "--resume" not in train
    assert "--model.vision.name" in vision and "--model.text.name" not in vision and "--model.init" not in vision
    assert all(name in model for name in ("--model.vision.name", "--model.text.name", "--model.init"))
    with pytest.raises(ValueError, match="no group of options is called 'rubbish'; there are: model, model.vision"):
        parse(PretrainOptions, ["--help", "rubbish"])


@pytest.mark.parametrize("word", ["--help_all", "--help-all"])
def test_all_of_the_help(capsys, word):
    shown = " ".join(help_of(capsys, PretrainOptions, word).split())
    assert all(f"--{name}" in shown for name in names(asdict(PretrainOptions())))
    assert "Peak learning rate of the two backbones" in shown


def test_the_first_of_several_paragraphs_is_how_a_program_is_called(capsys):
    with pytest.raises(SystemExit):
        parse(TrainOptionsOfOwn, ["--help"], description="train FILE [--rate 1%]\n\nTrains.\n\nSlowly.")
    assert capsys.readouterr().out.startswith("usage: train FILE [--rate 1%]\n\nTrains.\n\nSlowly.\n\noptions:")


def test_a_short_help_is_whole(capsys):
    shown = help_of(capsys, TrainOptionsOfOwn, "--help")
    assert shown.startswith("usage: ") and "--model MODEL [--config FILE]" in shown and "How fast." in shown
    assert shown == help_of(capsys, TrainOptionsOfOwn, "--help_all")


WRONG = [
    (["--train.learning_rate=1"], "--train.learning_rate"),
    (["--nonsense"], "--nonsense"),
    (["--train.lr=fast"], "train.lr"),
    (["--objective.distillation_loss=klx"], "objective.distillation_loss"),
    (["--objective.num_negatives=0"], "num_negatives must be at least 1, got 0"),
    (["--objective.itm=-1"], "objective.itm"),
    (["--objective.hard_threshold=2"], "objective.hard_threshold must be between 0 and 1, got 2"),
    (["--objective.hard_top=0"], "objective.hard_top must be at least 1, got 0"),
    (["--objective.teacher_temperature=0"], "objective.teacher_temperature must be above 0, got 0"),
    (["--objective.mining_pool=-3"], "objective.mining_pool must be at least 1, got -3"),
    (["--model.fusion.dropout=2"], "model.fusion.dropout must be from 0 to below 1, got 2"),
    (["--model.fusion.num_layers=0"], "model.fusion.num_layers 0 needs model.fusion.agreement"),
    (["--model.fusion.num_heads=0"], "model.fusion.num_heads must be at least 1, got 0"),
    (["--data.captions=two"], "data.captions"),
    (["--config=absent.yaml"], "absent.yaml"),
    (["--train.batch_size=0"], "train.batch_size must be at least 1, got 0"),
    (["--train.accumulation=0"], "train.accumulation"),
    (["--train.log_every=0"], "train.log_every"),
    (["--train.epochs=-1"], "train.epochs"),
    (["--train.max_steps=0"], "train.max_steps"),
    (["--train.lr=-0.1"], "train.lr must be at least 0, got -0.1"),
    (["--train.lr=nan"], "train.lr"),
    (["--train.warmup=10"], "train.warmup"),
    (["--train.clip=0"], "train.clip must be above 0, got 0"),
    (["--train.precision=fp8"], "train.precision"),
    (["--validation.batch_size=0"], "validation.batch_size"),
    (["--validation.rerank=-1"], "validation.rerank"),
    (["--validation.select=match", "--validation.rerank=0"], "validation.select 'match' needs validation.rerank"),
    (["--validation.select=match", "--objective.itm=0", "--objective.distillation=0"], "validation.select 'match'"),
]


@pytest.mark.parametrize(("arguments", "names"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_wrong_option_is_one_line_that_names_it_and_exit_status_2(arguments, names, capsys, monkeypatch):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        run(lambda: parse(PretrainOptions))
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and names in lines[0]


@pytest.mark.parametrize("name", ["train.lr", "data.split", "data.scenes", "model.vision.kwargs", "objective.itc"])
def test_an_option_that_cannot_be_unset_is_not_null(tmp_path, name):
    group, *inner = name.split(".")
    value = None
    for part in reversed(inner):
        value = {part: value}
    (tmp_path / "null.yaml").write_text(yaml.safe_dump({group: value}))
    with pytest.raises(ValueError, match=f"{name} needs a value, got null"):
        parse(PretrainOptions, [f"--config={tmp_path / 'null.yaml'}"])


def test_an_unknown_name_in_a_file_is_named(tmp_path):
    (tmp_path / "wrong.yaml").write_text("model: {vision: {size: 3}}\n")
    with pytest.raises(ValueError, match="size"):
        parse(PretrainOptions, [f"--config={tmp_path / 'wrong.yaml'}"])


@pytest.mark.parametrize("given", [["--config={}"], ["--config", "{}"]])
def test_a_config_file_that_is_not_text_is_named(tmp_path, given):
    (tmp_path / "text.yaml").write_text("train: {epochs: 7}\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xef\x80a: 1")
    words = [word.format(tmp_path / f"{name}.yaml") for name in ("text", "binary") for word in given]
    with pytest.raises(ValueError, match=f"--config {tmp_path}/binary.yaml is not a text file"):
        parse(PretrainOptions, words)


def test_unset_limits_are_allowed():
    assert TrainOptions(max_steps=None).max_steps is None
    assert ValidationOptions(max_images=None, every_epochs=0, rerank=0).rerank == 0


@dataclass
class Speed:
    """How it goes."""

    fast: bool = False
    """How fast."""


@dataclass
class TrainOptionsOfOwn:
    """What is trained."""

    model: str
    """What."""
    speed: Speed = field(default_factory=Speed)


def test_an_option_of_a_few_values_may_stay_unset():
    assert parse(ExportOptions, ["--model=run", "--output=out"]).tower is None
    assert parse(IndexOptions, ["--source=photos"]).tokens is None
