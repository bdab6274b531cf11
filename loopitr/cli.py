"""The command lines of recipes and `loopitr`: options from dataclasses, common checks, one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import select
import sys
import tempfile
import textwrap
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from loopitr.reading import MAX_VALUES, DuplicateName, expanded_size

Options = TypeVar("Options")
USAGE_ERROR, INTERRUPTED, NO_READER = 2, 130, 141
LOST_WORKER = "a process that reads data has ended, which the system does if memory runs out; use fewer workers: "
HELP, HELP_ALL = ("-h", "--help"), ("--help_all", "--help-all")
TWO_SCREENS = 100  # the number of lines above which --help only names the options of groups
SWITCHES = ("--recall", "--resume", "--resume_with_changes", "--table_only", "--json", "--open", "--missing")


def parse(
    options: type[Options],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
    program: str | None = None,
) -> Options:
    """Parse a command line to an instance of the dataclass `options`.

    Dotted options (`--train.lr 1e-4`) override YAML files (`--config`), which override the defaults. `--print_config`
    prints all values, `--help` explains the options. If that takes more than two screens, it only names the options of
    groups such as `data`, which `--help data` and `--help_all` explain.

    Args:
        arguments: None: those of this process.
        description: the text at the top of `--help`; the first of several paragraphs is the line of its usage.
        program: the name of the program in `--help`; None: the file that is run.

    Raises:
        ValueError: an option is unknown, has a value of the wrong type, or is required and missing.
    """
    given = sys.argv[1:] if arguments is None else arguments
    for path in _configs(given):
        _check_config(path)
    if any(word in (*HELP, *HELP_ALL) for word in given):
        print(_help(_parser.__wrapped__(options, program, description), given), end="")
        sys.exit(0)
    parser = _parser(options, program, description)  # type: ignore[arg-type]  # A class is hashable.
    try:
        namespace = parser.parse_args(_flags(given))
    except ArgumentError as error:
        raise ValueError(f"{error} (--help_all shows all options)") from error
    namespace.pop("config", None)
    _check_groups(options, namespace)
    # Before version 4.49 jsonargparse calls it instantiate_classes.
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    instantiated: Any = instantiate(namespace)
    return options(**vars(instantiated))


def run(main: Callable[[], None]) -> None:
    """Run a recipe.

    Errors that the user can correct, too little memory, and the death of a loader's process print one line to stderr
    and exit with status 2; Ctrl-C prints one line and exits with 130; other errors print a traceback. An error in the
    Rust code of a library, such as that of a tokenizer whose regular expression takes too long, prints one line too.
    LOOPITR_DEBUG=1 prints the traceback of every error. If the reader of the output has ended, such as `head`, this
    ends too, without a line.
    """
    try:
        try:
            main()
        finally:
            if sys.stdout is not None:  # It is None if it was closed.
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # A ModuleNotFoundError means that an extra is not installed.
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            sys.exit(NO_READER)
        if os.environ.get("LOOPITR_DEBUG"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    except BaseException as error:
        cause = "not enough memory: " if _lacks_memory(error) else LOST_WORKER if _lost_worker(error) else ""
        if not (cause or type(error).__name__ == "PanicException") or os.environ.get("LOOPITR_DEBUG"):
            raise
        print(f"error: {cause}{_one_line(error)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def _lacks_memory(error: BaseException) -> bool:
    """Whether there was not enough memory; only for that of a GPU does torch have a type of error."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _lost_worker(error: BaseException) -> bool:
    """Whether a process that reads data was killed; torch has no type of error for that.

    What begins with `Caught` is an error that such a process passed on.
    """
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error) and "Caught " not in str(error)


def _has_no_reader() -> bool:
    """Whether stdout is a pipe whose reader has ended; then stdout is turned off, since Python would write to it at
    exit."""
    with contextlib.suppress(OSError):  # stdout may have no file.
        output = sys.stdout.fileno()
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(output, select.POLLOUT)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)
                return True
    return False


def check_output_file(output: str | Path) -> None:
    """Check that a file can be written, before the work that produces it, and make its folder.

    Raises:
        ValueError: it is a folder, a pipe or a device, or its folder cannot be made or written to.
    """
    path = Path(output)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if path.exists() and not path.is_file():  # It would be replaced by a file.
            raise OSError("it is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"output {output} cannot be written: {error}") from error


@functools.cache
def _parser(options: Any, program: str | None, description: str | None) -> ArgumentParser:
    """Made once for all rows of a grid: reading every option's type takes several times longer than parsing them."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program,
        description=description,
        formatter_class=_Paragraphs,
        exit_on_error=False,  # Its usage would be 30 lines.
    )
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_class_arguments(options, as_group=False)
    return parser


def _help(parser: ArgumentParser, words: Sequence[str]) -> str:
    """The text of `--help`, `--help GROUP` or `--help_all`.

    Raises:
        ValueError: there is no such group.
    """
    required = [f"--{action.dest} {action.dest.upper()}" for action in parser._actions if action.required]
    parser.usage = " ".join(["%(prog)s", *required, "[--config FILE] [--OPTION VALUE ...]"])
    usage, _, about = (parser.description or "").partition("\n\n")
    if about:
        parser.usage, parser.description = usage.replace("%", "%%"), about
    for action in parser._actions:
        if action.dest == "print_config":
            action.help = "Print all options as YAML, as they are with the other arguments, and exit."
    groups = {action.dest: group for group in parser._action_groups for action in group._group_actions[:1]}
    groups = {name: group for name, group in groups.items() if name != "help"}
    asked = [following for word, following in zip(words, [*words[1:], "-"]) if word in HELP and following[:1] != "-"]
    chosen = [name for name in groups for wanted in asked if f"{name}.".startswith(f"{wanted}.")]
    if asked and not chosen:
        raise ValueError(f"no group of options is called {asked[0]!r}; there are: {', '.join(groups) or 'none'}")
    if chosen:
        parser.description = None
        _hide(parser, lambda dest: not any(f"{dest}.".startswith(f"{name}.") for name in chosen))
        return parser.format_help()
    whole = parser.format_help()
    if any(word in HELP_ALL for word in words) or whole.count("\n") <= TWO_SCREENS:
        return whole
    _hide(parser, lambda dest: any(f"{dest}.".startswith(f"{name}.") for name in groups))
    lines = [parser.format_help(), "\ngroups of options (--help GROUP explains one of them, --help_all all):\n"]
    for name, group in groups.items():
        names = [action.dest.removeprefix(f"{name}.") for action in group._group_actions if action.dest != name]
        lines.append(textwrap.fill(str(group.title), 98, initial_indent="  ", subsequent_indent="  ") + "\n")
        shown = textwrap.fill(f"--{name}.{{{', '.join(names)}}}", 98, initial_indent=" " * 4, subsequent_indent=" " * 8)
        lines.append(shown + "\n")
    return "".join(lines)


class _Paragraphs(DefaultHelpFormatter):
    """Keeps the paragraphs of a description apart."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(paragraph, width, indent) for paragraph in text.split("\n\n"))


def _hide(parser: ArgumentParser, hidden: Callable[[str], bool]) -> None:
    """Leave options out of `format_help`."""
    for action in parser._actions:
        if hidden(action.dest):
            action.help = SUPPRESS


def _flags(arguments: Sequence[str]) -> list[str]:
    """Add `=true` to switches without a value, such as `--resume`."""
    following = [*arguments[1:], ""]
    return [a + "=true" if a in SWITCHES and b not in ("true", "false") else a for a, b in zip(arguments, following)]


def _configs(arguments: Sequence[str]) -> list[Path]:
    """The files given as `--config FILE` or `--config=FILE`."""
    split = [(*word.partition("=")[::2], following) for word, following in zip(arguments, [*arguments[1:], ""])]
    return [Path(value or following) for name, value, following in split if name == "--config"]


def _check_config(path: Path) -> None:
    """Refuse files on which the parser would hang, or ignore a mistake; it reports other mistakes itself.

    Raises:
        ValueError: the file is a pipe or a device, is not text, has a name twice, or has aliases that are circular or
            expand to too many values.
    """
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise ValueError(f"--config {path} is not a file")
        return
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        size = expanded_size(tree, unique=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is not a text file: {error}") from error
    except DuplicateName as error:
        raise ValueError(f"--config {path}: {error}") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return
    if size > MAX_VALUES:
        raise ValueError(f"--config {path}: aliases are circular or expand to more than {MAX_VALUES} values")


def _check_groups(options: Any, namespace: Any, group: str = "") -> None:
    """Check that groups of options are not given as single values, and that only options that may be unset are null.

    Raises:
        ValueError: one is.
    """
    for field in dataclasses.fields(options):
        kind, value = field.default_factory, namespace.get(field.name)
        # Python writes the type of `Literal["a"] | None` as Optional[...], unless annotations stay text.
        may_be_unset = "None" in str(field.type) or "Optional" in str(field.type)
        if value is None and not dataclasses.is_dataclass(kind) and not may_be_unset:
            raise ValueError(f"{group}{field.name} needs a value, got null")  # jsonargparse lets it pass.
        if not dataclasses.is_dataclass(kind) or dataclasses.is_dataclass(value):
            continue
        if not isinstance(value, Namespace):
            raise ValueError(f"{group}{field.name} is a group of options, not a value, got {value!r}")
        _check_groups(kind, value, f"{group}{field.name}.")


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    if text.startswith("Caught ") and "DataLoader worker" in text:
        # The text has the worker's traceback; its last line is the error.
        text = text.splitlines()[-1].partition(": ")[2] or text
    return " ".join(text.split()) or type(error).__name__
