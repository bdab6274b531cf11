"""Command lines of the recipes: options from dataclasses, user errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

Options = TypeVar("Options")
USAGE_ERROR = 2


def parse(options: type[Options], arguments: Sequence[str] | None = None, *, description: str | None = None) -> Options:
    """Dotted options (`--train.lr 1e-4`) over YAML files (`--config`) over the dataclass's defaults.

    `--print_config` shows the tree, `--help` the meaning of each option; an unknown option ends the program.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_class_arguments(options, as_group=False)
    flags = [a + "=true" if a == "--resume" else a for a in (sys.argv[1:] if arguments is None else arguments)]
    namespace = parser.parse_args(flags)
    namespace.pop("config", None)
    instantiated: Any = parser.instantiate_classes(namespace)
    return options(**vars(instantiated))


def run(main: Callable[[], None]) -> None:
    """Run a recipe: what its user can mend is one line on stderr and exit status 2, anything else a traceback.

    LOOPITR_DEBUG=1 shows the traceback of every error.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("LOOPITR_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
