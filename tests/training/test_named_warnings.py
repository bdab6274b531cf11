"""What would spoil a run without a word is said by name: before it trains, or when it happens."""

import json
import shutil

import pytest
import torch
from helpers.tiny_run import run, tiny_options, trainer, write_table

from loopitr.data import DataOptions, HubStream, LoadReport, load_records
from loopitr.data.loader import SkipCounter
from loopitr.training import trainer as training
from loopitr.training.options import ValidationOptions
from loopitr.training.setup import load_run_records


def lines_of(data, **validation):
    lines = []
    load_run_records(data, ValidationOptions(**validation), log=lines.append)
    return [line for line in lines if line.startswith("warning: ")]


def table(folder, train=120, val=110):
    return write_table(folder / "table", {"train": range(train), "val": range(train, train + val)}, per_image=1)


def test_training_images_in_the_validation_are_named(tmp_path):
    path = table(tmp_path)
    data = DataOptions(table=str(path), images=str(path.parent / "images"))
    assert lines_of(data) == []
    for copy, of in ((130, 3), (200, 77)):
        shutil.copy(path.parent / "images" / f"{of}.jpg", path.parent / "images" / f"{copy}.jpg")
    (line,) = lines_of(data)
    assert line == "warning: 2 of the 110 val images are trained on too: 130.jpg (3.jpg), 200.jpg (77.jpg)"


def test_a_validation_too_small_to_choose_by_is_said(tmp_path):
    path = table(tmp_path, val=22)
    data = DataOptions(table=str(path), images=str(path.parent / "images"))
    assert lines_of(data) == [
        "warning: 22 val images choose the best model, and one of them is 4.5 points of R@1; hold out more"
    ]
    scenes = DataOptions(scenes=True, scenes_val=200)
    assert lines_of(scenes) == []
    assert "warning: 50 val images choose" in lines_of(scenes, max_images=50)[0]


def test_a_stream_has_no_images_to_compare(tmp_path, monkeypatch):
    from loopitr.training.record_checks import record_warnings

    records = load_records(DataOptions(scenes=True, limit=100), "val")
    stream = object.__new__(HubStream)
    assert record_warnings(stream, {"val": records}, chooses="val", max_images=None) == [
        "held-out images are not looked for among the training images, which are a stream"
    ]


def test_an_objective_of_weights_zero_is_refused(tmp_path):
    zero = {f"objective__{name}": 0.0 for name in ("itc", "itm", "lce", "distillation", "cmd", "cmc", "mlm")}
    with pytest.raises(ValueError, match="nothing would be trained: objective.itc, .* are all 0"):
        tiny_options(tmp_path, **zero)
    assert tiny_options(tmp_path, **{**zero, "objective__itc": 0.1}).objective.itc == 0.1


def test_learning_rates_of_zero_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing would be trained: train.lr and train.backbone_lr are both 0"):
        tiny_options(tmp_path, train__lr=0.0, train__backbone_lr=0.0)
    assert tiny_options(tmp_path, train__lr=0.0).train.lr == 0.0


def test_a_diverged_model_is_neither_validated_nor_kept(tmp_path, monkeypatch):
    """Its loss was finite: the last step made its weights what they are."""

    def step(self):
        original(self)
        with torch.no_grad():
            self.model.itm_head.weight[0, 0] = torch.inf

    original = training.Trainer._step
    monkeypatch.setattr(training.Trainer, "_step", step)
    with (
        trainer(tmp_path, train__max_steps=1) as made,
        pytest.raises(ValueError, match="diverged: itm_head.weight is not finite at step 1; lower the learning rate"),
    ):
        made.run()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("image,caption,caption\n0.jpg,a dog,a cat\n")
    with pytest.raises(ValueError, match="rows.csv: the header names 'caption' more than once"):
        load_records(DataOptions(table=str(tmp_path / "rows.csv")), "train")


def test_a_lone_surrogate_is_skipped_by_name(tmp_path):
    path = table(tmp_path, train=2, val=1)
    images = path.parent / "images"
    rows = [
        {"image": "0.jpg", "caption": ["a \ud83d dog", "a dog \U0001f436"]},
        {"image": "\udcff.jpg", "caption": "b"},
    ]
    (images / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = LoadReport()
    records = load_records(
        DataOptions(table=str(images / "rows.jsonl"), val_fraction=0.0, max_skipped_fraction=0.5), "train", report
    )
    assert [record.captions for record in records] == [("a dog \U0001f436",), ("b",)]
    assert report.counts == {"caption with half a character (a lone surrogate)": 1}
    assert report.names == {"caption with half a character (a lone surrogate)": ["0.jpg"]}
    report.skip("no such file", records[1].name)
    assert report.summary().encode() and r"\udcff.jpg" in report.summary()


@pytest.mark.slow
def test_a_file_is_counted_once_however_often_it_is_visited(tmp_path):
    """Over the epochs of a run, and over its parts."""
    path = write_table(tmp_path / "table", {"train": range(24), "val": range(24, 32)}, broken=(5, 7))
    changes = {
        "data__table": str(path),
        "data__images": str(path.parent / "images"),
        "data__max_skipped_fraction": 0.2,
        "train__batch_size": 4,
        "train__checkpoint_every": 2,
    }
    metrics = run(tmp_path / "a", **changes, train__epochs=3)
    assert metrics["training"]["skipped"] == {"unreadable image: truncated": 2}
    more = run(tmp_path / "a", **changes, train__epochs=4, resume_with_changes=True)
    assert more["training"]["skipped"] == {"unreadable image: truncated": 2}


def test_every_visit_counts_for_the_limit():
    from types import SimpleNamespace

    counter, lines = SkipCounter(max_fraction=0.1, log=lambda line: lines.append(line)), []
    part = SimpleNamespace(inputs={"input_ids": range(80)}, skipped=[("a.jpg", "truncated")] * 20, truncated=0)
    with pytest.raises(ValueError, match="20 of 100 items"):
        counter.update(part)
    assert counter.report.skipped == 1 and lines == ["skipped a.jpg: truncated"]
