"""What a run does with what lies in its folder already."""

import shutil

import pytest
from helpers.tiny_gallery import jpeg
from helpers.tiny_run import run, trainer

from loopitr.training.folder_lock import LOCK
from loopitr.training.run_folder import check_run_folder, move_aside


def test_an_earlier_run_is_moved_to_the_first_free_name(tmp_path):
    folder = tmp_path / "run"
    assert move_aside(folder) is None
    folder.mkdir()
    assert move_aside(folder) is None  # nothing in it
    (folder / LOCK).touch()
    assert move_aside(folder) is None
    (tmp_path / "run.2").symlink_to(tmp_path / "nowhere")
    for number in (1, 3):
        folder.mkdir(exist_ok=True)
        (folder / "which").write_text(str(number))
        (folder / "config.yaml").write_text("train: {output_dir: runs/x}")
        assert move_aside(folder) == tmp_path / f"run.{number}"
    assert [(tmp_path / f"run.{number}" / "which").read_text() for number in (1, 3)] == ["1", "3"]
    assert not folder.exists()


@pytest.mark.parametrize(
    "files",
    [
        {"0.jpg": jpeg(0), "1.jpg": jpeg(1)},
        {"setup.py": b"import this", "src/a.py": b""},
        {"config.json": b"{}", "model.safetensors": b""},  # a model that is no run
        {"config.yaml": b"server: {port: 80}", "main.py": b""},  # of another program
        {"config.yaml": b"train: {lr: 0.1}", "photo.jpg": b""},  # of another program that trains
        {"config.yaml": b"train: images/train", "photo.jpg": b""},
        {"config.yaml": b"train: [", "main.py": b""},
        {"config.yaml": b"[" * 5000, "main.py": b""},
        {".hidden": b""},
    ],
    ids=lambda files: " ".join(files),
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_anything_else_is_refused_and_stays_as_it_is(tmp_path, files, resume):
    folder = tmp_path / "run"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"train.output_dir {folder} holds {min(files).split('/')[0]}") as raised:
        run(tmp_path, train__max_steps=1, resume=resume)
    assert "\n" not in str(raised.value)
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tiny.yaml"]


def test_what_came_into_the_folder_while_the_data_were_read_is_kept_too(tmp_path):
    with trainer(tmp_path, train__max_steps=1) as made:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "0.jpg").write_bytes(jpeg(0))
        with pytest.raises(ValueError, match="holds 0.jpg and no config.yaml of a run"):
            made.run()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["0.jpg"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("text")
    with pytest.raises(ValueError, match="run is not a folder"):
        run(tmp_path, train__max_steps=1)
    assert (tmp_path / "run").read_text() == "text"


def test_the_current_folder_is_never_moved(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("train: {output_dir: runs/x}")
    (tmp_path / "within").mkdir()
    check_run_folder(tmp_path)
    for place in (tmp_path, tmp_path / "within"):
        monkeypatch.chdir(place)
        with pytest.raises(ValueError, match="is the folder you are in"):
            move_aside(tmp_path)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "within")
