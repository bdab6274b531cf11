"""Whatever is given as an option, it is taken as it is or refused in one line; no other error comes of it."""

import math
import os
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopitr.building.options import FusionOptions, LoraOptions, ModelOptions
from loopitr.cli import parse
from loopitr.data import DataError, DataOptions, LoadReport, load_records
from loopitr.evaluation import EvaluationOptions
from loopitr.objective.options import ObjectiveOptions
from loopitr.training.options import PretrainOptions, TrainOptions, ValidationOptions

few = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
numbers = st.sampled_from([-1, 0, 1, 2, 10**6, 10**30]) | st.integers()
reals = numbers | st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e-300, 0.5])
KINDS = (TrainOptions, ValidationOptions, ObjectiveOptions, FusionOptions, LoraOptions, EvaluationOptions)
PARTS = {"train": TrainOptions, "validation": ValidationOptions, "objective": ObjectiveOptions, "data": DataOptions}
WORDS = (
    "true",
    "null",
    "",
    "nan",
    "inf",
    "-1",
    "0",
    "1e999",
    "[]",
    "{}",
    "[1, 2]",
    "x",
    "é",
    "1.5",
    "softmax",
    "~",
    "'",
)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@few
@given(st.data(), st.sampled_from(KINDS))
def test_a_number_that_makes_no_sense_is_refused_by_name(data, kind):
    numeric = [field.name for field in fields(kind) if is_number(field.default)]
    changes = {
        name: data.draw(numbers if isinstance(getattr(kind, name), int) else reals)
        for name in data.draw(st.lists(st.sampled_from(numeric), min_size=1, max_size=2, unique=True))
    }
    try:
        options = kind(**changes)
    except ValueError as error:
        assert str(error).isprintable() and any(name in str(error) for name in changes)
    else:
        taken = [name for name, value in changes.items() if not math.isfinite(value)]
        assert not taken or taken == ["clip"], options  # An infinite clip is no clip.


@settings(few, max_examples=40)
@given(st.data())
def test_any_command_line_is_options_or_one_line(data):
    arguments = []
    for _ in range(data.draw(st.integers(1, 3))):
        part, kind = data.draw(st.sampled_from([*PARTS.items(), ("model", ModelOptions)]))
        name = data.draw(st.sampled_from([*[field.name for field in fields(kind)], "no_such", ""]))
        value = data.draw(st.sampled_from(WORDS) | st.text(max_size=8) | reals.map(str))
        arguments.append(f"--{part}.{name}={value}")
    try:
        options = parse(PretrainOptions, arguments)
    except ValueError as error:
        assert str(error)
    else:
        assert is_dataclass(options.train) and is_dataclass(options.model.vision)


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
CONFIGS = {
    "[": "parsing",
    "- 1": "- 1",
    "train: 5": "train is a group of options, not a value, got 5",
    "model: {vision: [1]}": "vision",
    "train: null": "train is a group of options, not a value, got None",
    "train: {lr: [1]}": "train.lr",
    "train: {lr: 1}\ntrain: {epochs: 2}": "train occurs twice",
    "train: {lr: 1, lr: 2}": "lr occurs twice",
    "\t": "parsing",
    "a: &a [*a]": "aliases are circular",
    "model: {vision: {kwargs: &a {x: *a}}}": "aliases are circular",
    LAUGHS: "expand to more than 100000 values",
    "[" * 5000: "nesting|expected node content",
    "1: 2": "string",
    "train: !!python/object/apply:os.system ['touch /tmp/evil']": "tag",
    "train: {class_path: os.system, init_args: {command: 'touch /tmp/evil'}}": "os.system|init_args.command",
    "train: {output_dir: !!binary aGVsbG8=}": "output_dir",
}


@pytest.mark.parametrize("content", CONFIGS, ids=range(len(CONFIGS)))
def test_a_file_of_options_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match=CONFIGS[content]):
        parse(PretrainOptions, [f"--config={tmp_path / 'x.yaml'}"])
    assert not Path("/tmp/evil").exists()


def test_a_config_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match="x.yaml is not a file"):
        parse(PretrainOptions, ["--config", str(tmp_path / "x.yaml")])


def test_merged_mappings_are_none_that_stand_twice(tmp_path):
    (tmp_path / "x.yaml").write_text("train: &a {lr: 1}\n")
    (tmp_path / "y.yaml").write_text("model: {vision: {kwargs: {<<: &b {x: 1}, <<: {y: *b}}}}\n")
    parse(PretrainOptions, [f"--config={tmp_path / 'x.yaml'}", f"--config={tmp_path / 'y.yaml'}"])


@few
@given(st.data())
def test_any_data_options_read_the_scenes_or_are_refused(data):
    changes = {
        name: data.draw(strategy)
        for name, strategy in {
            "scenes_train": st.integers(-3, 30),
            "scenes_val": st.integers(-3, 30),
            "scenes_image_size": st.integers(-5, 20),
            "limit": st.none() | st.integers(-3, 40),
            "val_fraction": st.none() | st.floats(),
            "max_skipped_fraction": st.floats(),
            "shuffle_buffer": numbers,
            "split": st.sampled_from(["train", "val", "test", "", "other"]),
            "val_split": st.sampled_from(["train", "val", "test", "", "other"]),
        }.items()
        if data.draw(st.booleans())
    }
    options = DataOptions(scenes=True, **changes)
    for split in {options.split, options.val_split}:
        try:
            records = load_records(options, split, LoadReport())
        except DataError as error:
            assert str(error).isprintable()
        else:
            assert 1 <= len(records) <= (options.limit or 10**6)
            limit = options.max_skipped_fraction
            assert limit >= 0 and records[0].captions
