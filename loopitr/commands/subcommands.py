"""Programs with several commands, each of which is imported when it is chosen."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand: its line in `--help`, and the function that runs it with its arguments."""

    line: str
    run: Callable[[Sequence[str]], None]


def dispatch(program: str, about: str, foot: str, commands: Mapping[str, Command], arguments: Sequence[str]) -> None:
    """Run the command that the first argument names, or print the list of commands.

    Raises:
        ValueError: there is no command, or it is unknown.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if name in ("-h", "--help"):
        width = max(map(len, commands)) + 2
        lines = "".join(f"  {name:{width}}{command.line}\n" for name, command in commands.items())
        print(f"usage: {program} COMMAND [options]\n\n{about}\ncommands:\n{lines}\n{foot}", end="")
    elif name in commands:
        commands[name].run(rest)
    else:
        given = f"unknown command {name!r}" if name else "no command is given"
        raise ValueError(f"{given}; known: {', '.join(commands)} ({program} --help says what they do)")


def quiet() -> None:
    """Turn off transformers' progress bars for weights, and print warnings in one line; for the whole process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)


def positional(arguments: Sequence[str], *names: str, rest: str | None = None) -> list[str]:
    """Turn the words before the first option into the options `names`, in this order. A word may begin with a dash.

    Further words become a list, the value of the option `rest`.

    Raises:
        ValueError: there are more words than names, and no `rest`.
    """
    words = list(arguments)
    count = next((place for place, word in enumerate(words) if word.startswith("--") or word == "-h"), len(words))
    given, options = words[:count], words[count:]
    if len(given) > len(names) and rest is None:
        wanted = " ".join(name.upper() for name in names)
        raise ValueError(
            f"unexpected argument {given[len(names)]!r}; wanted {wanted}, with quotes around several words"
        )
    flags = [f"--{name}={word}" for name, word in zip(names, given)]
    if given[len(names) :]:
        flags.append(f"--{rest}={json.dumps(given[len(names) :])}")
    return [*flags, *options]
