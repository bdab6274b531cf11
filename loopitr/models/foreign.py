"""Safe reading of model files from elsewhere: no code from a hub, and one-line errors for unreadable files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def check_no_kernel(config: Any, source: str) -> None:
    """Refuse a config that would make transformers download code.

    transformers takes the name of an attention implementation with a slash (`owner/name`) for a repository of the hub,
    and runs its code.

    Raises:
        ValueError: `config`, the content of a config.json, names such an attention.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name in ATTENTION and "/" in str(value):
                raise ValueError(f"{source}: its config.json asks for the attention {value!r}, which is code on a hub")
            check_no_kernel(value, source)


def refused_objects(error: Exception) -> str | None:
    """What to tell the user if `torch.load` refused a file that has more than weights; None: it failed otherwise."""
    if not re.search("unsupported (global|class)|not an allowed global", str(error), re.IGNORECASE):
        return None
    return "it holds Python objects besides tensors; reading those could run code: save only its weights"


@contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """A context for reading weights, configs and tokenizers, whose libraries raise many kinds of errors.

    Raises:
        OSError: damaged weights; other OSErrors, ValueErrors, and errors of memory or missing packages are unchanged.
        ValueError: any other error, as one line that names `source`.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{source}: its weights are damaged ({error})") from error
    except (OSError, ValueError, MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:
        reason = refused_objects(error) or next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{source} cannot be loaded: {reason}") from error
