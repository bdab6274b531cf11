"""Whatever the data, nothing waits for ever."""

import signal
import threading
from collections.abc import Iterator

import pytest

SECONDS = 120  # far more than any test here takes


class Hung(BaseException):
    """No `Exception`: what is under test turns those into skips."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung(f"still at it after {SECONDS} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
