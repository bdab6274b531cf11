"""A trainer made of objects with their defaults: what it writes, and that nothing is written before it runs."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from helpers.tiny_building import scratch
from helpers.tiny_gallery import captions, jpeg
from helpers.tiny_run import reset_accelerate, run, without_curves

from loopitr import LoopITRModel, LoopObjective, Record, Trainer, TrainOptions, build_model
from loopitr.data import DataOptions, scene_vocabulary
from loopitr.training.options import ValidationOptions


@pytest.fixture(autouse=True)
def _accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def records(numbers: range) -> list[Record]:
    return [Record(image=jpeg(i), captions=tuple(captions(i, 2)), identity=i, name=str(i)) for i in numbers]


def settings(folder: Path) -> TrainOptions:
    return TrainOptions(output_dir=str(folder), max_steps=2, batch_size=8, checkpoint_every=0, tracker="none")


def make_trainer(options: TrainOptions) -> Trainer:
    model, processor = build_model(scratch(), vocabulary=scene_vocabulary())
    return Trainer(LoopObjective(model), processor, records(range(16)), records(range(16, 24)), options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_it_writes_the_files_of_the_recipe(tmp_path):
    run(tmp_path / "recipe", train__max_steps=2)
    options = settings(tmp_path / "objects")
    with without_curves():
        metrics = make_trainer(options).run()
    assert files(tmp_path / "objects").keys() == files(tmp_path / "recipe" / "run").keys()
    assert (metrics["split"], metrics["num_images"], metrics["num_captions"]) == ("val", 8, 16)
    assert metrics["training"]["steps"] == 2
    LoopITRModel.from_pretrained(tmp_path / "objects")
    written = yaml.safe_load((tmp_path / "objects" / "config.yaml").read_text())
    given = {"train": options, "data": DataOptions(), "validation": ValidationOptions()}
    assert written == {name: asdict(value) for name, value in given.items()}


def test_making_it_writes_and_moves_nothing(tmp_path):
    folder = tmp_path / "run"
    make_trainer(settings(folder))
    assert not list(tmp_path.iterdir())
    reset_accelerate()
    folder.mkdir()
    earlier = {"metrics.json": b"of an earlier run", "config.yaml": b"train: {output_dir: x}"}
    for name, content in earlier.items():
        (folder / name).write_bytes(content)
    trainer = make_trainer(settings(folder))
    assert files(tmp_path) == {f"run/{name}": content for name, content in earlier.items()}
    trainer.run()
    (aside,) = [path for path in tmp_path.iterdir() if path != folder]
    assert files(aside) == earlier
    assert "model.safetensors" in files(folder)
