"""What a run does with what lies in its folder already."""

from loopitr.training.run_folder import move_aside


def test_an_earlier_run_is_moved_to_the_first_free_name(tmp_path):
    folder = tmp_path / "run"
    assert move_aside(folder) is None
    folder.mkdir()
    assert move_aside(folder) is None  # nothing in it
    for number in (1, 2):
        folder.mkdir(exist_ok=True)
        (folder / "which").write_text(str(number))
        assert move_aside(folder) == tmp_path / f"run.{number}"
    assert [(tmp_path / f"run.{number}" / "which").read_text() for number in (1, 2)] == ["1", "2"]
    assert not folder.exists()
