"""A context without gradient that leaves nothing behind in autocast's cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_gradient() -> Iterator[None]:
    """`torch.no_grad()`, after which autocast casts weights anew.

    Autocast keeps the weights that it has cast. In older versions of torch (its issue 112583), weights that are cast
    here would have no gradient where they are used again with gradient.
    """
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()
