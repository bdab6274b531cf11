"""`run`: what a user can mend is one line, anything else keeps its traceback."""

import os
import sys

import pytest
import torch
from forked import fork
from helpers.waiting import wait
from torch.utils.data import DataLoader

from loopitr.cli import run
from loopitr.data import DataError


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error",
    [ValueError("wrong\n  value"), DataError("a.csv: no column 'x'"), FileNotFoundError(2, "No such file", "a")],
)
def test_what_a_user_can_mend_is_one_line(error, capsys, monkeypatch):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    with pytest.raises(SystemExit) as raised:
        run(fail(error))
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


def test_an_error_without_words_is_named(capsys):
    with pytest.raises(SystemExit):
        run(fail(ValueError()))
    assert capsys.readouterr().err == "error: ValueError\n"


def test_a_panic_of_rust_code_is_one_line(capfd, monkeypatch):
    """As of a tokenizer whose regular expression was made to take for ever: its engine gives up."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    with pytest.raises(SystemExit) as raised:
        run(lambda: tokenizer.encode("x" * 60))
    errors = capfd.readouterr().err
    assert raised.value.code == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "error: Onig: Regex search error: retry-limit-in-match over"


def test_too_little_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    for error in (MemoryError(), RuntimeError("can't allocate memory: you tried to allocate 8 bytes")):
        with pytest.raises(SystemExit) as raised:
            run(fail(error))
        line = capsys.readouterr().err
        assert raised.value.code == 2 and line.startswith("error: not enough memory: ") and line.count("\n") == 1
    with pytest.raises(RuntimeError, match="a bug"):
        run(fail(RuntimeError("a bug")))


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LOOPITR_DEBUG", "1")
    with pytest.raises(ValueError, match="wrong"):
        run(fail(ValueError("wrong")))


def test_other_errors_keep_their_traceback(capsys):
    with pytest.raises(KeyError):
        run(fail(KeyError("a bug")))
    assert capsys.readouterr().err == ""


def test_success_is_silent(capsys, monkeypatch):
    run(lambda: None)
    monkeypatch.setattr(sys, "stdout", None)  # as of `>&-`
    run(lambda: None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["a line", "x" * 1_000_000], ids=["short", "long"])
def test_output_that_nobody_reads_ends_it_without_a_line(text, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)

    def main():
        os.dup2(writing, 1)
        sys.stdout.reconfigure(line_buffering=False)
        run(lambda: print(text))

    assert wait(fork(main, tmp_path / "log")) == 141
    assert (tmp_path / "log").read_text() == ""


def test_another_pipe_that_breaks_is_an_error(capsys):
    with pytest.raises(SystemExit) as raised:
        run(fail(BrokenPipeError(32, "Broken pipe")))
    assert raised.value.code == 2 and "Broken pipe" in capsys.readouterr().err


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise DataError(f"{index}.jpg: no such file")


def test_an_error_of_a_dataloader_worker_is_one_line_too(capsys, monkeypatch):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    with pytest.raises(SystemExit) as raised:
        run(lambda: next(iter(DataLoader(Broken(), num_workers=1))))
    assert raised.value.code == 2
    assert capsys.readouterr().err == "error: 0.jpg: no such file\n"


def test_the_death_of_a_loaders_process_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    for text in (
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
        "rank 1: RuntimeError: DataLoader worker x",
    ):
        with pytest.raises(SystemExit) as raised:
            run(fail(RuntimeError(text)))
        line = capsys.readouterr().err
        assert raised.value.code == 2 and line.startswith("error: a process that reads data has ended")
        assert line.count("\n") == 1
    with pytest.raises(RuntimeError, match="Caught"):
        run(fail(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback")))
