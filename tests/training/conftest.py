"""What runs on streams need."""

import datasets
import pytest


@pytest.fixture
def quick_streams(monkeypatch) -> None:
    """No long sleep at the end of each epoch of a stream of parquet files.

    `datasets` waits 5 s there for threads that could outlive the process (apache/arrow issue 45214), but the process of
    the tests goes on for longer than that.
    """
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
