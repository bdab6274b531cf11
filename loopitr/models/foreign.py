"""Model files of others: they name no code that would be fetched, and one that cannot be read is one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def check_no_kernel(config: Any, source: str) -> None:
    """transformers fetches an attention that is named like a repository (`owner/name`) from the hub, and runs it.

    Raises:
        ValueError: `config`, the content of a config.json, names such a one somewhere.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name in ATTENTION and "/" in str(value):
                raise ValueError(f"{source}: its config.json asks for the attention {value!r}, which is code of a hub")
            check_no_kernel(value, source)


@contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """Around the reading of weights, configs and tokenizers, whose readers raise nearly anything.

    Raises:
        ValueError: the first line of what went wrong; an OSError comes as it is, and so does a missing package.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{source}: its weights are damaged ({error})") from error
    except (OSError, ValueError, MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:
        if re.search("unsupported (global|class)|not an allowed global", str(error), re.IGNORECASE):
            reason = "it holds Python objects beside its tensors; reading those could run code: save its weights alone"
        else:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{source} cannot be loaded: {reason}") from error
