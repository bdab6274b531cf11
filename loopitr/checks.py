"""Checks of the values that a user gives as options: a ValueError in one line that names the option and its value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def check_at_least(least: float, group: str = "", *, wanted: str | None = None, **values: float | None) -> None:
    """Each of `values`, an option's name and its value, is at least `least` or None, which stands for an unset option.

    Args:
        group: what the options belong to, as the command line names it (`train`); empty: to nothing.
        wanted: the words for what a value must be; None: "at least" and the number.

    Raises:
        ValueError: a smaller value, NaN or infinity.
    """
    for name, value in values.items():
        if value is not None and not least <= value < float("inf"):
            option = f"{group}.{name}" if group else name
            raise ValueError(f"{option} must be {wanted or f'at least {least}'}, got {value}")


def check_known(known: Sequence[str], **values: str) -> None:
    """Each of `values`, an option's name and its value, is one of `known`.

    Raises:
        ValueError: another value; the line lists those that are known.
    """
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: torch does not know it, or this machine does not have it.
    """
    import torch  # It is imported on use, since --help does without it.

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch raises the second kind where it was built without such devices.
        raise ValueError(f"device {str(name)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
