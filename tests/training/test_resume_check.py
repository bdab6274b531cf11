"""A run goes on with the options it was begun with, or with others that --resume_with_changes accepts."""

import json
import shutil

import pytest
import torch
import yaml
from helpers.tiny_run import OPTIONS, logged, run, weights, write_table

from loopitr.data import trained_data
from loopitr.durable import write_manifest
from loopitr.training.resume_check import changed_options

SHORT = {"train__max_steps": 2, "train__checkpoint_every": 1}


def config(folder):
    return yaml.safe_load((folder / "run" / "config.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train__batch_size": 4}, "train.batch_size: 8 -> 4"),
        ({"train__lr": 0.5}, "train.lr: 0.001 -> 0.5"),
        ({"train__seed": 3}, "train.seed: 0 -> 3"),
        ({"train__max_steps": 4}, "train.max_steps: 2 -> 4"),
        ({"train__schedule": "warmup_stable_decay"}, "train.schedule: cosine -> warmup_stable_decay"),
        ({"data__flip": True}, "data.flip: False -> True"),
        ({"data__scenes_train": 32}, "data.scenes_train: 64 -> 32"),
        ({"objective__mining": "sample"}, "objective.mining: topk -> sample"),
        ({"model__freeze": ["text"]}, r"model.freeze: \[\] -> \['text'\]"),
        ({"validation__rerank": 2}, "validation.rerank: 4 -> 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_changes_the_run_is_named_and_nothing_is_written(begun, change, named):
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file() and path.name != "tiny.yaml"}
    with pytest.raises(ValueError, match=f"started with other options .*{named}.*--resume_with_changes") as raised:
        run(begun, **{**SHORT, **change}, resume=True)
    assert "\n" not in str(raised.value)
    after = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file() and path.name != "tiny.yaml"}
    assert after == before


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("begun")
    run(folder, **SHORT)
    return folder


def test_neither_resume_nor_its_consent_is_stored(tmp_path):
    for resume in ({"resume": True}, {"resume_with_changes": True}):
        run(tmp_path, **SHORT, **resume)
        assert not {"resume", "resume_with_changes"} & set(config(tmp_path))


def test_a_changed_learning_rate_and_weight_decay_are_those_of_the_next_step(tmp_path):
    changes = {**SHORT, "train__max_steps": 3, "train__keep_checkpoints": 3}
    run(tmp_path, **changes)
    before, checkpoints = logged(tmp_path, "train/lr"), tmp_path / "run" / "checkpoints"
    for step in (2, 3):
        shutil.rmtree(checkpoints / f"step-0000000{step}")
    (tmp_path / "run" / "metrics.json").unlink()
    run(tmp_path, **{**changes, "train__lr": 1e-2, "train__weight_decay": 0.5}, resume_with_changes=True)
    assert before[1] > 0 and logged(tmp_path, "train/lr") == pytest.approx([before[0], 10 * before[1], 0])
    file = checkpoints / "step-00000003" / "optimizer.bin"
    groups = torch.load(file, weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {group["initial_lr"] for group in groups} == {1e-3, 1e-2}  # of the backbones, of the rest


@pytest.mark.slow
def test_changes_that_are_accepted_are_said_and_the_earlier_options_kept(tmp_path, capsys):
    table = write_table(tmp_path / "table", {"train": range(24), "val": range(24, 32)})
    run(tmp_path, **SHORT)
    first = config(tmp_path)
    changes = {
        "train__max_steps": 3,
        "data__table": str(table),
        "data__images": str(table.parent / "images"),
    }
    capsys.readouterr()
    run(tmp_path, **{**SHORT, **changes}, resume_with_changes=True)
    output = capsys.readouterr().out
    assert "resuming with a change: train.max_steps: 2 -> 3" in output and "resuming from step 2" in output
    assert len(logged(tmp_path, "loss/total")) == 3
    assert config(tmp_path)["train"]["max_steps"] == 3
    earlier = yaml.safe_load((tmp_path / "run" / "config.before-00000002.yaml").read_text())
    assert earlier == first
    assert [run.data.table for run in trained_data(tmp_path / "run") if run.data] == [str(table), None]
    run(tmp_path, **{**SHORT, **changes}, resume=True)  # they are the run's own by now


def test_what_changes_nothing_may_change(tmp_path):
    run(tmp_path, **SHORT)
    free = {
        "train__checkpoint_every": 5,
        "train__keep_checkpoints": 1,
        "train__log_every": 7,
        "data__num_workers": 1,
        "validation__batch_size": 3,
        "validation__final_rerank": 2,
    }
    before = weights(tmp_path)
    run(tmp_path, **{**SHORT, **free}, resume=True)
    assert weights(tmp_path).keys() == before.keys()


def test_options_that_one_side_lacks_have_their_defaults():
    old = {"train": {"lr": 1e-3, "seed": 0}, "data": {"an_older_option": 1}}
    assert changed_options(old, {"train": {"lr": 1e-3, "accumulation": 1}, "data": {}}) == [
        "data.an_older_option: 1 -> unset"
    ]
    assert changed_options(old, {**old, "train": {"lr": 1e-3, "accumulation": 2}}) == ["train.accumulation: 1 -> 2"]
    assert changed_options(OPTIONS, {**OPTIONS, "resume": True}) == []


def test_where_a_cache_lies_is_free_and_whether_there_is_one_is_not():
    def caches(folder):
        return {"data": {"cache_images": folder}}

    assert changed_options(caches("a"), caches("b")) == []
    assert changed_options(caches(None), caches("b")) == ["data.cache_images: unset -> b"]


def test_another_spelling_of_a_place_is_no_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").touch()
    (tmp_path / "link.csv").symlink_to("a.csv")
    (tmp_path / "b.csv").touch()
    old = {"data": {"table": str(tmp_path / "a.csv"), "images": str(tmp_path)}}
    for table, images in (("a.csv", f"{tmp_path}/"), ("link.csv", "."), (f"{tmp_path}/../{tmp_path.name}/a.csv", ".")):
        assert changed_options(old, {"data": {"table": table, "images": images}}) == []
    for table in ("b.csv", "gone.csv", None):
        (change,) = changed_options(old, {"data": {"table": table, "images": "."}})
        assert change.startswith("data.table: ")
    assert changed_options({"data": {"split": "a.csv"}}, {"data": {"split": "./a.csv"}}) != []


def test_data_that_have_changed_are_a_change(tmp_path):
    table = write_table(tmp_path / "table", {"train": range(24), "val": range(24, 32)}, per_image=1)
    data = {"data__table": str(table), "data__images": str(table.parent / "images")}
    run(tmp_path, **SHORT, **data)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    (tmp_path / "run" / "metrics.json").unlink()
    header, *rows = table.read_text().splitlines()
    last, train, val = rows[-1], rows[:24], rows[24:]
    for changed, named in (
        (rows[::-1], "train data: 24 images and 24 captions -> the same number, in another order; val data: 8"),
        (rows[1:], r"\(train data: 24 images and 24 captions -> 23 images and 23 captions\)"),
        (
            [*rows[:-1], last.replace(",", ",other words ", 1)],
            r"\(val data: .* number, with other names or texts",
        ),
    ):
        table.write_text("\n".join([header, *changed]) + "\n")
        with pytest.raises(ValueError, match=f"was started with other options .*{named}"):
            run(tmp_path, **SHORT, **data, resume=True)
    table.write_text("\n".join([header, *val, *train]) + "\n")  # Rows of another split do not matter.
    run(tmp_path, **SHORT, **data, resume=True)
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    table.write_text("\n".join([header, *rows[1:]]) + "\n")
    before = (tmp_path / "run" / "data.json").read_text()
    run(tmp_path, **SHORT, **data, resume_with_changes=True)
    assert json.loads((tmp_path / "run" / "data.json").read_text())["train"]["images"] == 23
    assert (tmp_path / "run" / "data.before-00000001.json").read_text() == before
    assert [entry.described["images"] for entry in trained_data(tmp_path / "run")] == [23, 24]


def test_images_that_were_replaced_are_a_change(tmp_path):
    table = write_table(tmp_path / "table", {"train": range(24), "val": range(24, 32)}, per_image=1)
    images = table.parent / "images"
    data = {"data__table": str(table), "data__images": str(images)}
    run(tmp_path, **SHORT, **data)
    described = tmp_path / "run" / "data.json"
    for name, other in ((3, 10), (7, 11), (30, 12)):
        (images / f"{name}.jpg").write_bytes((images / f"{other}.jpg").read_bytes() + b"x")
    with pytest.raises(ValueError) as raised:
        run(tmp_path, **SHORT, **data, resume=True)
    assert (
        "(train data: 2 of 24 images are other files (of another size in bytes), the first is 3.jpg; "
        "val data: 1 of 8 images are other files (of another size in bytes), the first is 30.jpg)" in str(raised.value)
    )
    older = json.loads(described.read_text())
    for split in older.values():
        del split["sizes"]
    before = described.read_text()
    for content in (json.dumps(older), before.replace('"sizes": "', '"sizes": "x')):  # of an older run, and damaged
        described.write_text(content)
        run(tmp_path, **SHORT, **data, resume=True)  # It is finished, and says so.
    described.write_text(before)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    (tmp_path / "run" / "metrics.json").unlink()
    run(tmp_path, **SHORT, **data, resume_with_changes=True)
    assert (tmp_path / "run" / "data.before-00000001.json").read_text() == before


def test_the_number_of_workers_is_part_of_a_streams_order():
    old = {"data": {"streaming": True, "num_workers": 1}}
    assert changed_options(old, {"data": {"streaming": True, "num_workers": 2}}) == ["data.num_workers: 1 -> 2"]
    assert changed_options({"data": {"num_workers": 1}}, {"data": {"num_workers": 2}}) == []


def test_another_number_of_processes_is_a_change(tmp_path):
    run(tmp_path, **SHORT)
    (state,) = (tmp_path / "run" / "checkpoints").glob("step-00000002/progress.json")
    state.write_text(state.read_text().replace('"places": [[0, 2]]', '"places": [[0, 2], [0, 2]]'))
    write_manifest(state.parent)
    with pytest.raises(ValueError, match="processes: 2 -> 1"):
        run(tmp_path, **SHORT, resume=True)
