"""Nothing in a run folder runs code when a run is resumed: whatever holds some is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_run import equal, run, weights

from loopitr.durable import MANIFEST
from loopitr.training.checkpoints import newest_checkpoint
from loopitr.training.run_folder import check_run_folder

SHORT = {"train__max_steps": 2, "train__checkpoint_every": 1}


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str, ...]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two steps, killed after its last checkpoint."""
    folder = tmp_path_factory.mktemp("begun")
    run(folder, **SHORT)
    (folder / "run" / "metrics.json").unlink()
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    """Its newest checkpoint has no manifest, as an older version left it (and anybody can write one)."""
    shutil.copytree(begun, tmp_path / "x")
    (newest(tmp_path / "x") / MANIFEST).unlink()
    return tmp_path / "x"


def newest(folder):
    return folder / "run" / "checkpoints" / "step-00000002"


def test_every_file_of_a_checkpoint_is_of_a_known_safe_kind(begun):
    assert sorted(path.name for path in newest(begun).iterdir()) == [
        "config.yaml",  # read by YAML's safe loader
        "manifest.json",
        "model.safetensors",
        "optimizer.bin",  # this and the next: plain tensors and numbers, loaded as such alone
        "progress.json",
        "random_states_0.pkl",
        "scheduler.json",
    ]


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin"]
)
def test_a_pickle_that_runs_code_is_not_run(folder, tmp_path, name):
    evidence = tmp_path / "it ran"
    torch.save({"state": Malicious(evidence)}, newest(folder) / name)
    torch.load(newest(folder) / name, weights_only=False)  # it would
    assert evidence.exists()
    evidence.unlink()
    if name == "pytorch_model.bin":
        (newest(folder) / "model.safetensors").unlink()
    if name == "custom_checkpoint_0.pkl":
        (newest(folder) / "scheduler.json").unlink()  # as an older version left it
    with pytest.raises(ValueError, match="step-00000002 does not fit this run's model, or is damaged") as raised:
        run(folder, **SHORT, resume=True)
    assert "\n" not in str(raised.value)
    assert not evidence.exists()


def test_a_pickle_beside_the_schedulers_state_is_not_even_read(folder, tmp_path):
    evidence = tmp_path / "it ran"
    torch.save(Malicious(evidence), newest(folder) / "custom_checkpoint_0.pkl")
    with pytest.raises(ValueError, match="Number of custom checkpoints"):
        run(folder, **SHORT, resume=True)
    assert not evidence.exists()


def test_the_scheduler_of_an_older_checkpoint_is_loaded(folder):
    expected = weights(folder)
    state = json.loads((newest(folder) / "scheduler.json").read_text())
    (newest(folder) / "scheduler.json").unlink()
    torch.save(state, newest(folder) / "custom_checkpoint_0.pkl")
    run(folder, **SHORT, resume=True)
    assert equal(weights(folder), expected)
    assert json.loads((newest(folder) / "scheduler.json").read_text()) == state
    assert not (newest(folder) / "custom_checkpoint_0.pkl").exists()


@pytest.mark.parametrize("name", ["scheduler.json", "optimizer.bin", "random_states_0.pkl", "model.safetensors"])
def test_a_damaged_file_is_one_line(folder, name):
    (newest(folder) / name).write_bytes(b"{")
    with pytest.raises(ValueError, match="step-00000002 does not fit this run's model, or is damaged") as raised:
        run(folder, **SHORT, resume=True)
    assert "\n" not in str(raised.value)


def test_a_pipe_in_a_checkpoint_is_not_waited_for(begun, tmp_path, capsys):
    shutil.copytree(begun, tmp_path / "x")
    for name in ("model.safetensors", "manifest.json"):
        (newest(tmp_path / "x") / name).unlink()
    os.mkfifo(newest(tmp_path / "x") / "model.safetensors")
    run(tmp_path / "x", **SHORT, resume=True)
    assert "step-00000002 is damaged (model.safetensors is not a file)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -3),
        ("batch", 10**30),
        ("places", "x"),
        ("places", [[0]]),
        ("windows", 5),
        ("skipped", []),
        ("watch", []),
    ],
)
def test_progress_of_other_values_is_named(folder, name, value):
    path = newest(folder) / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    lines: list[str] = []
    found = newest_checkpoint(path.parents[1], log=lines.append)
    assert found is not None and found.progress.step == 1
    assert f"progress.json cannot be read ({name} is " in lines[0]


def test_progress_that_is_nested_too_deeply_is_named(folder):
    (newest(folder) / "progress.json").write_text("[" * 100_000)
    lines: list[str] = []
    assert newest_checkpoint(newest(folder).parent, log=lines.append) is not None
    assert "nested too deeply" in lines[0]


def test_nothing_is_written_through_a_link(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "x")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    for name in ("config.yaml", "data.json", "history.jsonl", "metrics.json", "README.md"):
        (tmp_path / "x" / "run" / f"{name}.partial").symlink_to(mine / "file")
    shutil.rmtree(newest(tmp_path / "x"))
    newest(tmp_path / "x").with_suffix(".partial").symlink_to(mine)
    run(tmp_path / "x", **SHORT, resume=True)
    assert [path.read_text() for path in mine.iterdir()] == ["mine"]


def test_a_config_that_constructs_objects_is_no_runs(tmp_path):
    evidence = tmp_path / "it ran"
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"train: !!python/object/apply:os.mkdir ['{evidence}']\n")
    with pytest.raises(ValueError, match="no config.yaml of a run"):
        check_run_folder(folder)
    assert not evidence.exists()


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(begun, tmp_path, capsys):
    expected = weights(begun)
    shutil.copytree(begun, tmp_path / "x")
    (newest(tmp_path / "x") / "optimizer.bin").write_bytes(b"{")
    run(tmp_path / "x", **SHORT, resume=True)
    output = capsys.readouterr().out
    assert "step-00000002 is damaged (optimizer.bin has 1 bytes of " in output
    assert "resuming from step 1" in output
    assert equal(weights(tmp_path / "x"), expected)
