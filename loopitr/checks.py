"""Checks of option values: a one-line ValueError names the option and its value."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def check_at_least(least: float, group: str = "", *, wanted: str | None = None, **values: float | None) -> None:
    """Check that each of `values` is at least `least`, or None for an unset option.

    Args:
        group: the group of the options on the command line, such as `train`; empty: none.
        wanted: what the message says that values must be; None: "at least" and the number.
        values: the options by name.

    Raises:
        ValueError: a value is not a number, smaller, NaN or infinite.
    """
    for name, value in values.items():
        if value is not None and not (isinstance(value, Real) and least <= value < float("inf")):
            option = f"{group}.{name}" if group else name
            shown = value if isinstance(value, Real) else repr(value)
            raise ValueError(f"{option} must be {wanted or f'at least {least}'}, got {shown}")


def check_whole(least: int, *, unset: bool = False, **values: int | None) -> None:
    """Check that each of `values`, the options by name, is a whole number of at least `least`.

    Args:
        unset: whether None is allowed too.

    Raises:
        ValueError: a value is not.
    """
    for name, value in values.items():
        if value is None and unset:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        check_at_least(least, **{name: value})


def check_known(known: Sequence[str], **values: str) -> None:
    """Check that each of `values`, the options by name, is one of `known`.

    Raises:
        ValueError: a value is not; the message lists `known`.
    """
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: torch does not know it, or this machine does not have it.
    """
    import torch  # This import is not at the top, since --help does not need it.

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch raises an AssertionError if it was built without support for the device.
        raise ValueError(f"device {str(name)!r} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' cannot be used: it computes nothing")
    return device
