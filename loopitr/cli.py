"""Command lines of recipes and of `loopitr`: options from dataclasses, shared checks, user errors in one line."""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

Options = TypeVar("Options")
USAGE_ERROR = 2
SWITCHES = ("--recall", "--resume", "--resume_with_changes", "--table_only")


def parse(
    options: type[Options],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
    program: str | None = None,
) -> Options:
    """Dotted options (`--train.lr 1e-4`) over YAML files (`--config`) over the dataclass's defaults.

    `--print_config` shows the tree, `--help` the meaning of each option.

    Args:
        description: what `--help` says first.
        program: what `--help` calls the program; None: the file that is run.

    Raises:
        ValueError: an unknown option, a value of the wrong type, a required option that is missing.
    """
    given = sys.argv[1:] if arguments is None else arguments
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program, description=description, exit_on_error=False)  # Its usage would be 30 lines.
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_class_arguments(options, as_group=False)
    try:
        namespace = parser.parse_args(_flags(given))
    except ArgumentError as error:
        raise ValueError(f"{error} (--help shows all options)") from error
    except UnicodeDecodeError as error:  # The error does not say of which file it is.
        raise ValueError(f"--config {_not_text(given)} is not a text file: {error}") from error
    namespace.pop("config", None)
    # Before version 4.49 jsonargparse calls it instantiate_classes.
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    instantiated: Any = instantiate(namespace)
    return options(**vars(instantiated))


def run(main: Callable[[], None]) -> None:
    """Run a recipe: what its user can mend is one line on stderr and exit status 2, anything else a traceback.

    LOOPITR_DEBUG=1 shows the traceback of every error.
    """
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # A module is not found where an extra is not installed.
        if os.environ.get("LOOPITR_DEBUG"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def check_output_file(output: str | Path) -> None:
    """Before the work that fills it; makes the file's folder.

    Raises:
        ValueError: a folder, or a file in a folder that cannot be made or written to.
    """
    path = Path(output)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"output {output} cannot be written: {error}") from error


def _flags(arguments: Sequence[str]) -> list[str]:
    """A switch alone, such as `--resume`, means true."""
    following = [*arguments[1:], ""]
    return [a + "=true" if a in SWITCHES and b not in ("true", "false") else a for a, b in zip(arguments, following)]


def _not_text(arguments: Sequence[str]) -> str:
    """The first file given as `--config FILE` or `--config=FILE` that is not text."""
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, _, value = word.partition("=")
        try:
            if name == "--config":
                Path(value or following).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return value or following
    return "FILE"


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if text.startswith("Caught ") and "DataLoader worker" in text:
        # torch puts the worker's traceback into the text.
        text = text.splitlines()[-1].partition(": ")[2] or text
    return " ".join(text.split()) or type(error).__name__
