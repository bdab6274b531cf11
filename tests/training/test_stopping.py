"""A signal is not lost, wherever in the code it arrives."""

import signal
import threading
import weakref

import pytest

from loopitr.training.stopping import Stopped, Stopping


class Ending:
    """Gets a signal while it is deleted."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


class Referred:
    pass


def delete() -> None:
    Ending()


def delete_what_is_referred_to() -> None:
    referred = Referred()
    reference = weakref.ref(referred, lambda _: signal.raise_signal(signal.SIGTERM))
    del referred
    assert reference() is None


@pytest.mark.parametrize("interrupted", [delete, delete_what_is_referred_to])
def test_a_signal_where_nothing_can_be_raised_stops_the_run_a_little_later(capfd, interrupted):
    with Stopping() as stopping, pytest.raises(Stopped) as raised, stopping.at_once():
        interrupted()
        threading.Event().wait(10)
        raise AssertionError("the signal is lost")
    assert raised.value.signal == stopping.signal == signal.SIGTERM
    assert "Traceback" not in capfd.readouterr().err


def test_other_exceptions_that_cannot_be_raised_are_left_to_the_hook_before(monkeypatch):
    class Faulty:
        def __del__(self) -> None:
            raise ValueError("a fault")

    seen = []
    monkeypatch.setattr("sys.unraisablehook", seen.append)
    with Stopping():
        Faulty()
    assert [type(each.exc_value) for each in seen] == [ValueError]
    Faulty()
    assert len(seen) == 2


def test_a_run_that_ends_first_gets_no_second_signal(monkeypatch):
    sent = []
    monkeypatch.setattr("os.kill", lambda *arguments: sent.append(arguments))
    monkeypatch.setattr("loopitr.training.stopping.LATER", 0.2)
    with Stopping() as stopping, stopping.at_once():
        delete()
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for timer in timers:
        timer.join()
    assert not sent
